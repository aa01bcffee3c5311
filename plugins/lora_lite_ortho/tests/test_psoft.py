"""PSOFT against the form that writes the weight, and against the peft package from the same tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll
from tests.oracles import D_IN, D_OUT, assert_parity, assert_same, filled, peft_twin

NAMES = ("lora_q", "lora_c", "lora_d")


def skew(entries: Tensor, r: int) -> Tensor:
    rows, columns = torch.triu_indices(r, r, 1)
    Q = torch.zeros(r, r, dtype=entries.dtype).index_put((rows, columns), entries)
    return Q - Q.T


def own(layer: Any) -> dict[str, Tensor]:
    return {name: getattr(layer, name).detach().clone().requires_grad_() for name in NAMES if hasattr(layer, name)}


CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "pissa": {"start": "pissa"},
    "free": {"orthogonal": False},
    "rotation alone": {"mag_out": False, "mag_in": False},
    "out alone": {"mag_in": False},
    "in alone": {"mag_out": False},
    "series": {"terms": 5},
    "bounded series": {"terms": 6, "bound": 0.5},
}


def turn(q: Tensor, cfg: Any) -> Tensor:
    """R, written out."""
    eye = torch.eye(cfg.r, dtype=q.dtype)
    if not cfg.orthogonal:
        return eye + q
    Q = skew(q, cfg.r)
    if cfg.bound is not None and float(torch.linalg.matrix_norm(Q.detach())) > cfg.bound:
        Q = Q * cfg.bound / torch.linalg.matrix_norm(Q)
    if cfg.terms is None:
        return (eye + Q) @ torch.linalg.inv(eye - Q)
    powers = [torch.linalg.matrix_power(Q, k) for k in range(1, cfg.terms)]
    return eye + 2 * sum(powers[:-1], torch.zeros_like(Q)) + powers[-1]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CONFIGS)
def test_formula(case: str, bias: bool) -> None:
    cfg = ll.PSOFTConfig(r=5, **CONFIGS[case])
    layer, x = filled(cfg, size=0.4, bias=bias)
    U, S, Vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    torch.testing.assert_close(layer.lora_B @ layer.lora_A, (U[:, :5] * S[:5]) @ Vh[:5], rtol=0, atol=1e-10)
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    gram = A @ A.T
    torch.testing.assert_close(
        gram, torch.diag(S[:5]) if case == "pissa" else torch.eye(5).double(), rtol=0, atol=1e-10
    )
    names = own(layer)
    one = torch.zeros(5, dtype=torch.float64)
    core = turn(names["lora_q"], cfg)
    core = torch.diag(1 + names.get("lora_d", one)) @ core @ torch.diag(1 + names.get("lora_c", one))
    weight = layer.weight - B @ A + B @ core @ A
    assert_same(layer, x, F.linear(x, weight, layer.bias), names, 1e-11)


def test_one_dimension_is_scaled() -> None:
    """Nothing turns in it; without the rotation its number is trained."""
    layer, x = filled(ll.PSOFTConfig(r=1, orthogonal=False), size=0.4)
    names = own(layer)
    core = (1 + names["lora_d"]) * (1 + names["lora_q"]) * (1 + names["lora_c"])
    weight = layer.weight + layer.lora_B.detach() @ (core - 1) @ layer.lora_A.detach()
    assert_same(layer, x, F.linear(x, weight, layer.bias), names, 1e-11)


def test_columns_keep_their_angles_in_the_subspace() -> None:
    """What the rotation does to the principal part of the weight: Gram matrices of its columns stay."""
    layer, _ = filled(ll.PSOFTConfig(r=5, mag_in=False, mag_out=False))
    A, S2 = layer.lora_A.detach(), layer.lora_B.detach().square().sum(0)
    R = turn(layer.lora_q.detach(), ll.PSOFTConfig(r=5))
    torch.testing.assert_close((R @ A).T @ (R @ A), A.T @ A, rtol=0, atol=1e-12)
    torch.testing.assert_close(S2.sqrt(), torch.linalg.svdvals(layer.weight.detach())[:5], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("fields", "count"), [({}, 6 + 8), ({"orthogonal": False}, 16 + 8), ({"mag_in": False, "mag_out": False}, 6)]
)
def test_counts_and_liveness(fields: dict[str, Any], count: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    adapter = ll.attach(model, ll.PSOFTConfig(r=4, **fields))
    assert sum(p.numel() for p in adapter.parameters()) == count
    model(torch.randn(3, D_IN)).square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in adapter.parameters())


def test_dropout_leaves_the_start_alone() -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT)).train()
    x = torch.randn(50, D_IN)
    before = model(x)
    adapter = ll.attach(model, ll.PSOFTConfig(r=4, dropout=0.5))
    assert torch.equal(model(x), before)
    nn.init.normal_(adapter.layers()["0"].params["lora_q"])
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 1}, r"PSOFTConfig\(r=1\): a rotation needs at least 2 dimensions"),
        ({"dropout": 1.0}, r"PSOFTConfig\(dropout=1.0\): dropout is a number from 0 to below 1"),
        ({"start": "olora"}, r"PSOFTConfig\(start='olora'\): give 'psoft' or 'pissa'"),
        ({"terms": 5, "bound": 0}, r"PSOFTConfig\(bound=0\): the largest norm of Q is a number above 0, or None"),
        ({"bound": 0.5}, r"terms is of the rotation \(orthogonal=True\), bound of the series \(terms=5\)"),
        ({"orthogonal": False, "terms": 5}, r"terms is of the rotation"),
        ({"terms": 1}, r"PSOFTConfig\(terms=1\): a series that turns has at least 2 terms"),
    ],
)
def test_options_that_make_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ll.ConfigError, match=message):
        ll.PSOFTConfig(**fields)


def test_a_rank_that_is_too_large() -> None:
    with pytest.raises(ll.TargetError, match=r"PSOFTConfig\(r=17\) on a layer 24 → 16: r is at most 16"):
        ll.attach(nn.Sequential(nn.Linear(D_IN, D_OUT)), ll.PSOFTConfig(r=17))


THEIRS: dict[str, dict[str, Any]] = {
    "default": {},
    "pissa": {"ab_svd_init": "pissa_init"},
    "free": {"psoft_orth": False},
    "rotation alone": {"psoft_mag_b": False, "psoft_mag_a": False},
    "series": {"use_cayley_neumann": True},
    "bounded series": {"use_cayley_neumann": True, "num_cayley_neumann_terms": 6, "cayley_neumann_eps": 0.5},
}


@pytest.mark.parametrize("case", THEIRS)
def test_parity_with_peft(case: str) -> None:
    peft = pytest.importorskip("peft")
    layer, x = filled(ll.PSOFTConfig(r=5, **CONFIGS[case]), torch.float32, size=0.3)
    model, inner = peft_twin(layer, peft.PsoftConfig(r=5, psoft_alpha=3, target_modules=["0"], **THEIRS[case]))
    inner._set_psoft_ab_cache_buffers("default", layer.lora_A.detach(), layer.lora_B.detach() * 5 / 3)
    R = inner.psoft_R["default"]
    R.weight.data = layer.lora_q.detach() + (torch.eye(5) if case == "free" else 0)
    pairs = [(layer.lora_q, R.weight)]
    for theirs, ours in (("vector_b", "lora_d"), ("vector_a", "lora_c")):
        if hasattr(layer, ours):
            getattr(R, theirs).data = 1 + getattr(layer, ours).detach()
            pairs.append((getattr(layer, ours), getattr(R, theirs)))
    assert_parity(layer, x, model, pairs)
