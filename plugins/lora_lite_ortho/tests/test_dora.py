"""DoRA against the formula with the dense weight, and against the peft package."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lora_lite as ll
from tests.oracles import D_IN, D_OUT, assert_parity, assert_same, filled, peft_twin


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_formula(bias: bool, alpha: float | None) -> None:
    layer, x = filled(ll.DoRAConfig(r=4, alpha=alpha), bias=bias, size=0.3)
    A, B, m = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B, layer.lora_m))
    V = layer.weight + (alpha or 4) / 4 * B @ A
    magnitude = layer.weight.norm(dim=1) * (1 + m)
    weight = (magnitude / V.norm(dim=1).detach())[:, None] * V
    assert_same(layer, x, F.linear(x, weight, layer.bias), {"lora_A": A, "lora_B": B, "lora_m": m})


def test_counts_and_liveness() -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    adapter = ll.attach(model, ll.DoRAConfig(r=4))
    assert sum(p.numel() for p in adapter.parameters()) == 4 * (D_IN + D_OUT) + D_OUT
    model(torch.randn(3, D_IN)).square().sum().backward()
    layer = model[0]
    assert float(layer.lora_A.grad.abs().max()) == 0
    assert float(layer.lora_B.grad.abs().min()) > 0
    assert float(layer.lora_m.grad.abs().min()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_accurate(dtype: torch.dtype) -> None:
    """Through the frozen layer, also a bfloat16 one."""
    from lora_lite_ortho.dora import _norm_ratio

    torch.manual_seed(0)
    layer = nn.Linear(1024, 512).to(dtype)
    A, B = torch.randn(16, 1024) / 32, torch.randn(512, 16) / 32
    W = layer.weight.detach().double()
    w2 = W.float().square().sum(1)
    exact = W.norm(dim=1) / (W + 2 * B.double() @ A.double()).norm(dim=1)
    ratio = _norm_ratio(layer, A, B, w2, 2.0, dtype)
    assert float((ratio.double() / exact - 1).abs().max()) < (1e-6 if dtype == torch.float32 else 1e-3)


def test_a_zero_row_stays_zero() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].weight.data[1] = 0
    x = torch.randn(2, 4)
    base = model(x)
    ll.attach(model, ll.DoRAConfig(r=2))
    assert torch.equal(model(x), base)


def test_parity_with_peft() -> None:
    peft = pytest.importorskip("peft")
    layer, x = filled(ll.DoRAConfig(r=4, alpha=8), torch.float32, size=0.3)
    theirs, inner = peft_twin(layer, peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["0"]))
    A, B, m = (
        inner.lora_A["default"].weight,
        inner.lora_B["default"].weight,
        inner.lora_magnitude_vector["default"].weight,
    )
    A.data, B.data = layer.lora_A.data.clone(), layer.lora_B.data.clone()
    norm = layer.weight.norm(dim=1)
    m.data = norm * (1 + layer.lora_m.data)
    assert_parity(layer, x, theirs, [(layer.lora_A, A), (layer.lora_B, B)])
    (ours,) = torch.autograd.grad(layer(x).square().mean(), layer.lora_m)
    (expected,) = torch.autograd.grad(theirs(x).square().mean(), m)
    torch.testing.assert_close(ours, expected * norm, rtol=1e-5, atol=1e-5)  # ours is an offset relative to the norm
