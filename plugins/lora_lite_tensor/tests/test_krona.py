"""KronA against the Kronecker product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lora_lite as ll
from tests.oracles import D_IN, D_OUT, assert_same, filled


@pytest.mark.parametrize("fields", [{}, {"a1": 8, "a2": 3, "scaling": 2.5}, {"a1": 1}, {"a1": 16, "a2": 24}], ids=str)
def test_formula(fields: dict[str, Any]) -> None:
    layer, x = filled(ll.KronAConfig(**fields))
    A, B = (getattr(layer, f"lora_{name}").detach().clone().requires_grad_() for name in "AB")
    change = torch.stack([(one * B) for one in A.flatten()]).unflatten(0, A.shape).transpose(1, 2).reshape(D_OUT, D_IN)
    assert torch.equal(change, torch.kron(A, B))
    expected = F.linear(x, layer.weight + fields.get("scaling", 1.0) * change, layer.bias)
    assert_same(layer, x, expected, {"lora_A": A, "lora_B": B}, 1e-11)


def test_the_rank_is_a_product() -> None:
    layer, x = filled(ll.KronAConfig())
    change = layer(x) - F.linear(x, layer.weight, layer.bias)
    assert layer.lora_A.shape == (4, 4)
    assert layer.lora_B.shape == (4, 6)
    assert int(torch.linalg.matrix_rank(torch.kron(layer.lora_A, layer.lora_B).detach())) == 16
    assert int(torch.linalg.matrix_rank(change.detach())) == len(x)


def test_a_scale_of_zero_would_train_nothing() -> None:
    with pytest.raises(ll.ConfigError, match=r"KronAConfig\(scaling=0\): .* a number other than 0"):
        ll.KronAConfig(scaling=0)


def test_tokens() -> None:
    model = nn.Sequential(nn.Embedding(12, 10))
    for parameter in ll.attach(model, ll.KronAConfig(target_names=("0",))).parameters():
        nn.init.normal_(parameter)
    ids = torch.tensor([[0, 7], [11, 3]])
    change = torch.kron(model[0].lora_A, model[0].lora_B)
    torch.testing.assert_close(model(ids), (model[0].weight + change.T)[ids])


def test_start_and_refusals() -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    adapter = ll.attach(model, ll.KronAConfig(a1=2, a2=12))
    assert model[0].lora_A.all()
    assert not model[0].lora_B.any()
    assert sum(p.numel() for p in adapter.parameters()) == 2 * 12 + 8 * 2
    with pytest.raises(
        ll.TargetError, match=r"KronAConfig\(a1=5\) does not divide d_out=16; what does: \[1, 2, 4, 8, 16"
    ):
        ll.attach(model, ll.KronAConfig(a1=5), name="other")
    with pytest.raises(
        ll.TargetError, match=r"KronAConfig\(a2=5\) does not divide d_in=24; what does: \[1, 2, 3, 4, 6"
    ):
        ll.attach(model, ll.KronAConfig(a2=5), name="other")
    with pytest.raises(ll.ConfigError, match=r"KronAConfig\(a2=0\): a whole number of at least 1, or None"):
        ll.KronAConfig(a2=0)
    with pytest.raises(ll.ConfigError, match=r"KronAConfig\(scaling=None\): scaling is a finite number"):
        ll.KronAConfig(scaling=None)  # type: ignore[arg-type]
