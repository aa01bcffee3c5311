"""LoRA against its formula and against the peft package."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lora_lite as ll


def filled(cfg: ll.AdapterConfig, dtype: torch.dtype, bias: bool = True) -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 7, bias=bias)).to(dtype)
    for parameter in ll.attach(model, cfg).parameters():
        nn.init.normal_(parameter)
    return model[0], torch.randn(5, 12, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("alpha", "rslora"), [(None, False), (8.0, False), (8.0, True), (None, True)])
def test_formula(bias: bool, alpha: float | None, rslora: bool) -> None:
    layer, x = filled(ll.LoRAConfig(r=4, alpha=alpha, rslora=rslora), torch.float64, bias)
    scale = (alpha or 4) / (math.sqrt(4) if rslora else 4)
    A, B = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    expected = F.linear(x, layer.weight + scale * B @ A, layer.bias)
    got = layer(x)
    assert float((got - expected).detach().abs().max()) < 1e-12
    direction = torch.randn_like(got)
    ours = torch.autograd.grad(got, (x, layer.lora_A, layer.lora_B), direction)
    theirs = torch.autograd.grad(expected, (x, A, B), direction)
    assert all(float((a - b).detach().abs().max()) < 1e-12 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_a_bias_of_B(bias: bool, rslora: bool) -> None:
    cfg = ll.LoRAConfig(r=4, alpha=8, rslora=rslora, bias=True)
    layer, x = filled(cfg, torch.float64, bias)
    names = ("lora_A", "lora_B", "lora_bias")
    A, B, c = (getattr(layer, name).detach().clone().requires_grad_() for name in names)
    scale = 4 if rslora else 2
    expected = F.linear(x, layer.weight, layer.bias) + scale * (x @ A.T @ B.T + c)
    got = layer(x)
    assert float((got - expected).detach().abs().max()) < 1e-12
    direction = torch.randn_like(got)
    ours = torch.autograd.grad(got, (x, *(getattr(layer, name) for name in names)), direction)
    theirs = torch.autograd.grad(expected, (x, A, B, c), direction)
    assert all(float((a - b).detach().abs().max()) < 1e-12 for a, b in zip(ours, theirs, strict=True))


def test_where_a_bias_of_B_cannot_go(tmp_path: Path) -> None:
    """A plain LoRA has none, embeddings and experts of the peft package neither; merged it is the layer's bias."""
    model, x = nn.Sequential(nn.Linear(12, 7)), torch.randn(5, 12)
    for parameter in ll.attach(model, ll.LoRAConfig(r=4, bias=True)).parameters():
        nn.init.normal_(parameter)
    expected = model(x).detach()
    with pytest.raises(ll.MergeError, match="shifts the bias of 0"):
        ll.export_lora(model, tmp_path / "served")
    with pytest.raises(ll.MergeError, match="shifts the bias of 0"):
        ll.combine(model, {"default": 1.0}, name="sum")
    ll.export_peft(model, tmp_path / "theirs")
    ll.merge(model)
    torch.testing.assert_close(model(x).detach(), expected)
    table = nn.Sequential(nn.Embedding(12, 7))
    nn.init.normal_(
        ll.attach(table, ll.LoRAConfig(r=2, bias=True, target_names=("0",))).layers()["0"].params["lora_bias"]
    )
    with pytest.raises(ll.MergeError, match="lora_B.bias of an embedding has no form in PEFT"):
        ll.export_peft(table, tmp_path / "table")


def test_start() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 7))
    ll.attach(model, ll.LoRAConfig(r=16))
    bound = 1 / math.sqrt(400)
    assert 0.99 * bound < float(model[0].lora_A.detach().abs().max()) <= bound
    assert float(model[0].lora_B.detach().abs().max()) == 0
    model(torch.randn(2, 400)).sum().backward()
    assert float(model[0].lora_A.grad.abs().max()) == 0, "A has no gradient while B is zero"
    assert float(model[0].lora_B.grad.abs().max()) > 0


def test_frozen_A() -> None:
    model = nn.Sequential(nn.Linear(12, 7))
    adapter = ll.attach(model, ll.LoRAConfig(r=3, freeze_a=True))
    assert [p.shape for p in adapter.parameters()] == [(7, 3)]
    assert isinstance(model[0].lora_A, nn.Parameter)
    assert float(model[0].lora_A.detach().abs().max()) > 0


def test_number_of_parameters() -> None:
    model = nn.Sequential(nn.Linear(12, 7))
    assert sum(p.numel() for p in ll.attach(model, ll.LoRAConfig(r=3)).parameters()) == 3 * (12 + 7)


@pytest.mark.parametrize("rslora", [True, False])
def test_parity_with_peft(rslora: bool) -> None:
    peft = pytest.importorskip("peft")
    layer, x = filled(ll.LoRAConfig(r=4, alpha=8, rslora=rslora), torch.float32)
    twin = nn.Sequential(nn.Linear(12, 7))
    twin[0].load_state_dict({"weight": layer.weight, "bias": layer.bias})
    theirs = peft.get_peft_model(twin, peft.LoraConfig(r=4, lora_alpha=8, use_rslora=rslora, target_modules=["0"]))
    inner = theirs.base_model.model[0]
    inner.lora_A["default"].weight.data = layer.lora_A.data.clone()
    inner.lora_B["default"].weight.data = layer.lora_B.data.clone()
    ours, expected = layer(x), theirs(x)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    ours.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, inner.lora_A["default"].weight.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layer.lora_B.grad, inner.lora_B["default"].weight.grad, rtol=1e-5, atol=1e-4)
