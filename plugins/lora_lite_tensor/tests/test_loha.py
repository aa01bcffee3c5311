"""LoHa against the product of two low-rank matrices, and against the peft package."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lora_lite as ll
from tests.oracles import D_IN, D_OUT, assert_parity, assert_same, filled, peft_twin

NAMES = ("lora_A1", "lora_B1", "lora_A2", "lora_B2")


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("r", [2, 3, 5])  # r² rows and columns, and a matrix
def test_formula(r: int, alpha: float | None) -> None:
    layer, x = filled(ll.LoHaConfig(r=r, alpha=alpha))
    A1, B1, A2, B2 = (getattr(layer, name).detach().clone().requires_grad_() for name in NAMES)
    change = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    for k in range(r):
        for m in range(r):
            change = change + torch.outer(B1[:, k], A1[k]) * torch.outer(B2[:, m], A2[m])
    expected = F.linear(x, layer.weight + (alpha or r) / r * change, layer.bias)
    assert_same(layer, x, expected, dict(zip(NAMES, (A1, B1, A2, B2), strict=True)), 1e-11)


def test_a_tall_layer() -> None:
    layer = nn.Linear(5, 40, dtype=torch.float64)
    for parameter in ll.attach(nn.Sequential(layer), ll.LoHaConfig(r=2)).parameters():
        nn.init.normal_(parameter)
    A1, B1, A2, B2 = (getattr(layer, name) for name in NAMES)
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight + (B1 @ A1) * (B2 @ A2), layer.bias))


def test_start() -> None:
    model = nn.Sequential(nn.Linear(300, 200))
    adapter = ll.attach(model, ll.LoHaConfig(r=4))
    A1, B1, A2, B2 = (getattr(model[0], name).detach() for name in NAMES)
    assert not B2.any()
    for tensor, size in ((A1, 1.0), (A2, 1.0), (B1, 0.1)):
        assert float(tensor.std()) == pytest.approx(size, rel=0.1)
    assert sum(p.numel() for p in adapter.parameters()) == 2 * 4 * 500


def test_rank_is_that_of_a_product() -> None:
    layer, _ = filled(ll.LoHaConfig(r=3))
    x = torch.eye(D_IN, dtype=torch.float64)
    change = layer(x) - F.linear(x, layer.weight, layer.bias)
    assert int(torch.linalg.matrix_rank(change.detach())) == 9


@pytest.mark.parametrize("r", [2, 5])
def test_parity_with_peft(r: int) -> None:
    peft = pytest.importorskip("peft")
    layer, x = filled(ll.LoHaConfig(r=r, alpha=6), torch.float32)
    theirs, inner = peft_twin(layer, peft.LoHaConfig(r=r, alpha=6, target_modules=["0"]))
    pairs = [(layer.lora_B1, inner.hada_w1_a), (layer.lora_A1, inner.hada_w1_b)]
    pairs += [(layer.lora_B2, inner.hada_w2_a), (layer.lora_A2, inner.hada_w2_b)]
    for ours, table in pairs:
        table["default"].data.copy_(ours.data)
    assert_parity(layer, x, theirs, [(ours, table["default"]) for ours, table in pairs])
