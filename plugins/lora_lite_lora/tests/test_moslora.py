"""MoSLoRA against its formula, and against LoRA."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lora_lite as ll
from tests.oracles import D_IN, D_OUT, assert_same, filled


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_formula(alpha: float | None) -> None:
    layer, x = filled(ll.LoraLiteConfig(variant="moslora", r=4, alpha=alpha))
    A, M, B = (getattr(layer, name).detach().clone().requires_grad_() for name in ("lora_A", "lora_M", "lora_B"))
    expected = F.linear(x, layer.weight + (alpha or 4) / 4 * B @ M @ A, layer.bias)
    assert_same(layer, x, expected, {"lora_A": A, "lora_M": M, "lora_B": B}, 1e-10)


@pytest.mark.parametrize("mixer", ["orthogonal", "kaiming_uniform"])
def test_start(mixer: str) -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    adapter = ll.attach(model, ll.LoraLiteConfig(variant="moslora", r=8, mixer=mixer))
    assert sum(p.numel() for p in adapter.parameters()) == 8 * (D_IN + D_OUT) + 64
    M = model[0].lora_M.detach()
    turns = torch.allclose(M @ M.T, torch.eye(8), atol=1e-6)
    assert turns == (mixer == "orthogonal")
    assert float(M.abs().max()) <= (1 if turns else 8**-0.5)
    assert float(M.abs().max()) > 0.9 * 8**-0.5


def test_the_identity_as_mixer_is_lora() -> None:
    layer, x = filled(ll.LoraLiteConfig(variant="moslora", r=4))
    layer.lora_M.data = torch.eye(4).double()
    lora, _ = filled(ll.LoRAConfig(r=4))
    lora.lora_A.data, lora.lora_B.data = layer.lora_A.data, layer.lora_B.data
    torch.testing.assert_close(layer(x), lora(x))


def test_refusals() -> None:
    with pytest.raises(
        ll.ConfigError, match=r"MoSLoRAConfig\(mixer='eye'\): M starts as one of 'orthogonal', 'kaiming"
    ):
        ll.LoraLiteConfig(variant="moslora", mixer="eye")
