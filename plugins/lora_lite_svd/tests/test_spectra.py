"""SVF, SVFT and the Spectral Adapter against the forms that write the weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll
from tests.oracles import assert_same

WIDE, TALL, SQUARE = (24, 16), (16, 24), (16, 16)


def made(cfg: ll.AdapterConfig, sizes: tuple[int, int] = WIDE, bias: bool = True) -> tuple[Any, Tensor]:
    """A layer with that adapter, its trainable tensors random, and an input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*sizes, bias=bias)).double()
    x = torch.randn(5, sizes[0], dtype=torch.float64, requires_grad=True)
    before = model(x)
    adapter = ll.attach(model, cfg)
    assert torch.equal(model(x), before)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model[0], x


def triplets(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(layer.weight.detach(), full_matrices=False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [WIDE, TALL, SQUARE])
def test_svf_scales_singular_values(sizes: tuple[int, int], bias: bool) -> None:
    layer, x = made(ll.SVFConfig(), sizes, bias)
    U, S, Vh = triplets(layer)
    z = layer.lora_z.detach().clone().requires_grad_()
    assert_same(layer, x, F.linear(x, (U * (S * (1 + z))) @ Vh, layer.bias), {"lora_z": z}, 1e-10)
    assert {name for name, _ in layer.named_parameters()} - {"weight", "bias"} == {
        "lora_z",
        "lora_U" if sizes == WIDE else "lora_V",
    }


def test_svf_without_its_basis_is_a_small_file(tmp_path: Path) -> None:
    sizes = []
    for save_basis in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 64))
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        for parameter in ll.attach(model, ll.SVFConfig(save_basis=save_basis)).parameters():
            nn.init.normal_(parameter, std=0.5)
        path = tmp_path / f"{save_basis}.safetensors"
        ll.save(model, path)
        sizes.append(path.stat().st_size)
        again = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 64))
        again.load_state_dict(weights)
        ll.load(again, path)
        x = torch.randn(7, 96)
        torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)
    assert sizes[0] - sizes[1] > 2 * 64 * 64 * 4 - 1000
    assert sizes[1] < 6000


def test_svf_on_equal_singular_values() -> None:
    """Which one is scaled is arbitrary: kept in the file, or refused."""
    model = nn.Sequential(nn.Linear(8, 8))
    nn.init.eye_(model[0].weight)
    with pytest.raises(ll.TargetError, match=r"0 has singular values that are equal; SVFConfig\(save_basis=True\) can"):
        ll.attach(model, ll.SVFConfig(save_basis=False))
    assert ll.attach(model, ll.SVFConfig()).targets


def test_svf_of_a_weight_of_low_rank_needs_no_saved_basis() -> None:
    """Directions that the weight does not see are equal, and scale nothing."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False)).double()
    model[0].weight.data = model[0].weight.data[:, :3] @ model[0].weight.data[:3]
    adapter = ll.attach(model, ll.SVFConfig(save_basis=False))
    nn.init.normal_(adapter.layers()["0"].params["lora_z"])
    U, S, Vh = triplets(model[0])
    x = torch.randn(5, 8, dtype=torch.float64)
    weight = (U * (S * (1 + model[0].lora_z.detach()))) @ Vh
    torch.testing.assert_close(model(x), x @ weight.T, rtol=0, atol=1e-7)


def banded(entries: Tensor, r: int, width: int) -> Tensor:
    """M, filled entry by entry."""
    M = torch.zeros(r, r, dtype=entries.dtype)
    places = [(i, i) for i in range(r)]
    for k in range(1, width + 1):
        places += [(i, i + k) for i in range(r - k)] + [(i + k, i) for i in range(r - k)]
    assert len(places) == len(entries)
    for place, entry in zip(places, entries, strict=True):
        M = M.index_put(tuple(torch.tensor(one) for one in place), entry)
    return M


@pytest.mark.parametrize("sizes", [WIDE, TALL])
@pytest.mark.parametrize("r", [None, 5])
@pytest.mark.parametrize("width", [0, 1, 3])
def test_svft_mixes_singular_vectors(width: int, r: int | None, sizes: tuple[int, int]) -> None:
    layer, x = made(ll.SVFTConfig(off_diagonal=width, r=r), sizes)
    U, Vh = layer.lora_U.detach(), layer.lora_Vh.detach()
    size = r or 16
    exact = triplets(layer)
    for ours, theirs in (
        (U @ U.T, exact[0][:, :size] @ exact[0][:, :size].T),
        (Vh.T @ Vh, exact[2][:size].T @ exact[2][:size]),
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    core = U.T @ layer.weight.detach() @ Vh.T
    torch.testing.assert_close(core, torch.diag(exact[1][:size]), rtol=0, atol=1e-9)
    m = layer.lora_m.detach().clone().requires_grad_()
    weight = layer.weight + U @ banded(m, size, width) @ Vh
    assert_same(layer, x, F.linear(x, weight, layer.bias), {"lora_m": m}, 1e-11)


@pytest.mark.parametrize("sizes", [WIDE, TALL])
def test_spectral_adapter_trains_singular_vectors(sizes: tuple[int, int]) -> None:
    layer, x = made(ll.SpectralConfig(r=4), sizes)
    U, S, Vh = layer.lora_U.detach(), layer.lora_S.detach(), layer.lora_Vh.detach()
    exact = triplets(layer)
    torch.testing.assert_close(S, exact[1][:4], rtol=0, atol=1e-9)
    torch.testing.assert_close((U * S) @ Vh, (exact[0][:, :4] * exact[1][:4]) @ exact[2][:4], rtol=0, atol=1e-9)
    torch.testing.assert_close(U.T @ U, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-9)
    names = {name: getattr(layer, name).detach().clone().requires_grad_() for name in ("lora_dU", "lora_dV")}
    weight = layer.weight - (U * S) @ Vh + ((U + names["lora_dU"]) * S) @ (Vh + names["lora_dV"])
    assert_same(layer, x, F.linear(x, weight, layer.bias), names, 1e-11)


@pytest.mark.parametrize(
    ("cfg", "count"),
    [
        (ll.SVFConfig(), 16),
        (ll.SVFTConfig(), 16),
        (ll.SVFTConfig(off_diagonal=2), 16 + 2 * 15 + 2 * 14),
        (ll.SVFTConfig(off_diagonal=1, r=4), 4 + 2 * 3),
        (ll.SpectralConfig(r=4), 4 * (24 + 16)),
    ],
)
def test_counts_and_liveness(cfg: ll.AdapterConfig, count: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*WIDE))
    adapter = ll.attach(model, cfg)
    assert sum(p.numel() for p in adapter.parameters()) == count
    model(torch.randn(3, 24)).square().sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).all()) for p in adapter.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 17}, r"SVFTConfig\(r=17, off_diagonal=0\) on a layer 24 → 16: r is at most 16 and off_diagonal below r"),
        ({"off_diagonal": 16}, r"SVFTConfig\(r=None, off_diagonal=16\) on a layer 24 → 16"),
    ],
)
def test_sizes_that_do_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ll.TargetError, match=message):
        ll.attach(nn.Sequential(nn.Linear(*WIDE)), ll.SVFTConfig(**fields))


def test_options_that_make_no_sense() -> None:
    with pytest.raises(ll.ConfigError, match=r"SVFTConfig\(off_diagonal=-1\): give a whole number of at least 0"):
        ll.SVFTConfig(off_diagonal=-1)
    with pytest.raises(ll.ConfigError, match=r"SVFTConfig\(r=0\): give a whole number of at least 1"):
        ll.SVFTConfig(r=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamss", "osf", "svf", "svft", "spectral"])
def test_it_learns(name: str) -> None:
    from lora_lite_bench.runs.run import Job, run

    lr = ll.get_variant(name).bench["lr"]
    fields: dict[str, Any] = {"r": 4} if name == "spectral" else {}
    losses = run(Job("shifted", {"batch_size": 64}, name, fields, seed=0, lr=lr, steps=30, whole=False)).losses
    assert sum(losses[-3:]) / 3 < 0.3 * losses[0], losses
