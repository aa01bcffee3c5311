"""HRA against the chain of reflections, and against the peft package."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll
from tests.oracles import D_IN, D_OUT, assert_same, filled, peft_twin


def chain(U: Tensor) -> Tensor:
    R = torch.eye(U.shape[1], dtype=U.dtype)
    for u in U:
        R = R - 2 * torch.outer(R @ u, u) / u.square().sum()
    return R


@pytest.mark.parametrize("r", [2, 8])
def test_formula(r: int) -> None:
    layer, x = filled(ll.HRAConfig(r=r))
    U = layer.lora_U.detach().clone().requires_grad_()
    assert_same(layer, x, F.linear(x, layer.weight @ chain(U), layer.bias), {"lora_U": U})


def test_start() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 8))
    adapter = ll.attach(model, ll.HRAConfig(r=8))
    U = model[0].lora_U
    assert torch.equal(U[0::2], U[1::2])
    assert 0.49 < float(U.detach().abs().max()) <= math.sqrt(2 / 8)
    assert sum(p.numel() for p in adapter.parameters()) == 8 * 400
    model(torch.randn(3, 400)).square().sum().backward()
    gradient = U.grad
    assert float(gradient.abs().max()) > 0
    torch.testing.assert_close(gradient[0::2], -gradient[1::2], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("paired", [True, False])
def test_orthogonality(paired: bool) -> None:
    layer, _ = filled(ll.HRAConfig(r=8), torch.float32)
    if paired:
        layer.lora_U.data[1::2] = layer.lora_U.data[0::2]
    R = (
        layer.lora_U.new_tensor(0)
        + ll.get_variant("hra").forward_input({"x": torch.eye(D_IN), "params": {"lora_U": layer.lora_U}}).detach()
    )
    assert float((R @ R.T - torch.eye(D_IN)).abs().max()) < 1e-5


def test_a_zero_row_is_dropped() -> None:
    layer, x = filled(ll.HRAConfig(r=4))
    layer.lora_U.data[2] = 0
    R = chain(layer.lora_U.detach()[[0, 1, 3]])
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight @ R, layer.bias))


def test_bfloat16_is_near_float64() -> None:
    layer, x = filled(ll.HRAConfig(r=8))
    hook = ll.get_variant("hra").forward_input
    exact = hook({"x": x, "params": {"lora_U": layer.lora_U}})
    rough = hook({"x": x.bfloat16(), "params": {"lora_U": layer.lora_U.float()}})
    assert float(((rough.double() - exact).norm() / exact.norm()).detach()) < 5e-3


def test_a_single_input_has_nothing_to_be_reflected_in() -> None:
    """Pairs of sign changes: no value of U would do anything."""
    with pytest.raises(
        ll.TargetError, match=r"0: HRAConfig on a layer with d_in=1: .*; leave the layer out with exclude_names"
    ):
        ll.attach(nn.Sequential(nn.Linear(1, 6)), ll.HRAConfig(r=2))


def test_odd_ranks() -> None:
    with pytest.raises(ll.ConfigError, match=r"HRAConfig\(r=3\): reflections start in pairs, so r must be even; use 4"):
        ll.HRAConfig(r=3)
    with pytest.raises(ll.ConfigError, match=r"HRAConfig\(r=5\)"):
        ll.HRAConfig(r=4, rank_pattern={"q": 5})
    with pytest.raises(ll.ConfigError, match="HRAConfig has no field 'alpha'"):
        ll.HRAConfig(alpha=2)


def test_the_regulariser_is_what_penalty_adds() -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT), nn.Linear(D_OUT, D_IN))
    ll.attach(model, ll.HRAConfig(r=2, orthogonality=0.5))
    start = ll.penalty(model)
    torch.testing.assert_close(start, torch.tensor(math.sqrt(2.0)))  # pairs are parallel: I − [[1,1],[1,1]], twice ½
    start.backward()
    for layer in model:
        assert layer.lora_U.grad is not None
        layer.lora_U.data = torch.eye(2, layer.in_features)
    assert float(ll.penalty(model).detach()) == 0
    ll.attach(model, ll.LoRAConfig(), name="other")
    assert float(ll.penalty(model, "other")) == 0
    with pytest.raises(ll.ConfigError, match=r"HRAConfig\(orthogonality=-1\): a weight is a number from 0"):
        ll.HRAConfig(orthogonality=-1)


def test_parity_with_peft() -> None:
    peft = pytest.importorskip("peft")
    layer, x = filled(ll.HRAConfig(r=8), torch.float32)
    theirs, inner = peft_twin(layer, peft.HRAConfig(r=8, target_modules=["0"]))
    U = inner.hra_u["default"]
    U.data = layer.lora_U.data.T.clone()
    ours, expected = layer(x), theirs(x)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    (a,) = torch.autograd.grad(ours.square().mean(), layer.lora_U)
    (b,) = torch.autograd.grad(expected.square().mean(), U)
    torch.testing.assert_close(a, b.T, rtol=1e-4, atol=1e-5)
