"""MoLoRA against its formula, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from tests.oracles import D_IN, D_OUT, assert_same, filled


def one(x: Tensor, p: dict[str, Tensor], r: int, top_k: int, scale: float) -> Tensor:
    """The change of one token."""
    logits = [row @ x for row in p["lora_G"]]
    best = sorted(range(len(logits)), key=lambda e: -float(logits[e].detach()))[: top_k or len(logits)]
    total = sum(torch.exp(logits[e]) for e in best)
    change = torch.zeros(len(p["lora_B"])).double()
    for e in best:
        part = slice(e * r, (e + 1) * r)
        change = change + torch.exp(logits[e]) / total * scale * p["lora_B"][:, part] @ p["lora_A"][part] @ x
    return change


@pytest.mark.parametrize("top_k", [0, 1, 2, 3])
def test_formula(top_k: int) -> None:
    layer, x = filled(ll.LoraLiteConfig(variant="molora", r=4, experts=3, top_k=top_k, alpha=6.0), size=0.5)
    p = {name: getattr(layer, name).detach().clone().requires_grad_() for name in ("lora_A", "lora_B", "lora_G")}
    changes = torch.stack([one(row, p, 4, top_k, 1.5) for row in x])
    expected = x @ layer.weight.T + layer.bias + changes
    if top_k == 1:  # its share is 1, whatever the router says
        changes.sum().backward(retain_graph=True)
        assert float(p["lora_G"].grad.abs().max()) < 1e-12  # type: ignore[union-attr]
    assert_same(layer, x, expected, p, 1e-10)


def test_experts_that_are_as_good_are_not_all_used() -> None:
    """In bfloat16 two logits are equal now and then: top_k experts are used all the same."""
    layer, x = filled(ll.LoraLiteConfig(variant="molora", r=4, experts=3, top_k=1))
    layer.lora_G.data[:] = layer.lora_G.data[0]
    p = {name: getattr(layer, name).detach() for name in ("lora_A", "lora_B")}
    parts = [slice(4 * e, 4 * e + 4) for e in range(3)]
    each = torch.stack([x @ (p["lora_B"][:, part] @ p["lora_A"][part]).T for part in parts])
    change = layer(x) - x @ layer.weight.T - layer.bias
    assert ((change - each).abs().amax(-1) < 1e-10).sum(0).tolist() == [1] * len(x)


def test_equal_experts_are_one_lora() -> None:
    """Whatever the router says: its shares are 1 together."""
    layer, x = filled(ll.LoraLiteConfig(variant="molora", r=4, experts=3))
    lora, _ = filled(ll.LoRAConfig(r=4))
    layer.lora_A.data, layer.lora_B.data = lora.lora_A.data.repeat(3, 1), lora.lora_B.data.repeat(1, 3)
    torch.testing.assert_close(layer(x), lora(x))


def test_start() -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    adapter = ll.attach(model, ll.LoraLiteConfig(variant="molora", r=4, experts=3))
    assert sum(p.numel() for p in adapter.parameters()) == 3 * (4 * D_IN + 4 * D_OUT + D_IN)
    assert 0.8 / math.sqrt(D_IN) < float(model[0].lora_G.detach().abs().max()) <= 1 / math.sqrt(D_IN)


def test_embeddings_have_a_mixture_too() -> None:
    model = nn.Sequential(nn.Embedding(D_IN, D_OUT)).double()
    for parameter in ll.attach(model, ll.LoraLiteConfig(variant="molora", r=2, target_names=("0",))).parameters():
        nn.init.normal_(parameter)
    p = {name: getattr(model[0], name) for name in ("lora_A", "lora_B", "lora_G")}
    expected = model[0].weight[3] + one(torch.eye(D_IN).double()[3], p, 2, 0, 1.0)
    torch.testing.assert_close(model(torch.tensor([3]))[0], expected)


def test_refusals() -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    ll.attach(model, ll.LoraLiteConfig(variant="molora", r=4))
    with pytest.raises(ll.MergeError, match="molora"):
        ll.merge(model)
    with pytest.raises(ll.ConfigError, match=r"MoLoRAConfig\(experts=0\): it is a whole number of at least 1"):
        ll.LoraLiteConfig(variant="molora", experts=0)
    with pytest.raises(ll.ConfigError, match=r"MoLoRAConfig\(top_k=5\): from 1 to experts=4, or 0 for all"):
        ll.LoraLiteConfig(variant="molora", top_k=5)
