"""DeLoRA against its formula in both forms, and against the peft package in the zero-B form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll
from tests.oracles import D_IN, D_OUT, assert_same, filled, peft_twin


def update(A: Tensor, B: Tensor, strength: Tensor, weight: Tensor) -> Tensor:
    """(λ/r) B Ξ A ⊙ w, densely."""
    xi = torch.diag(1 / (A.norm(dim=1) * B.norm(dim=0)))
    return strength / len(A) * (B @ xi @ A) * weight.norm(dim=0)


def test_formula_with_frozen_copies() -> None:
    layer, x = filled(ll.DeLoRAConfig(r=4, lambda0=3.0))
    dA, dB, delta = (p.detach().clone().requires_grad_() for p in (layer.lora_dA, layer.lora_dB, layer.lora_lambda))
    A0, B0 = layer.lora_A0.detach(), layer.lora_B0.detach()
    change = update(A0 + dA, B0 + dB, 3 + delta, layer.weight) - update(A0, B0, 3 + delta, layer.weight)
    assert_same(
        layer,
        x,
        F.linear(x, layer.weight + change, layer.bias),
        {"lora_dA": dA, "lora_dB": dB, "lora_lambda": delta},
        1e-11,
    )


def test_formula_without() -> None:
    layer, x = filled(ll.DeLoRAConfig(r=4, lambda0=3.0, frozen_copy=False))
    A, B, delta = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B, layer.lora_lambda))
    weight = layer.weight + update(A, B, 3 + delta, layer.weight)
    assert_same(layer, x, F.linear(x, weight, layer.bias), {"lora_A": A, "lora_B": B, "lora_lambda": delta}, 1e-11)


@pytest.mark.parametrize("frozen_copy", [True, False])
def test_counts_and_liveness(frozen_copy: bool) -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    adapter = ll.attach(model, ll.DeLoRAConfig(r=4, frozen_copy=frozen_copy))
    assert sum(p.numel() for p in adapter.parameters()) == 4 * (D_IN + D_OUT) + 1
    model(torch.randn(3, D_IN)).square().sum().backward()
    dead = {name for name, p in model[0].named_parameters() if p.requires_grad and float(p.grad.abs().max()) == 0}
    assert dead == ({"lora_lambda"} if frozen_copy else {"lora_lambda", "lora_A"})


def test_frozen_copies_start_smoothly_where_zero_B_jumps() -> None:
    """After one Adam step of 1e-4, the update relative to the weight: small with copies, full strength without."""
    sizes = {}
    for frozen_copy in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(128, 128, bias=False))
        optimizer = torch.optim.AdamW(
            ll.attach(model, ll.DeLoRAConfig(r=8, frozen_copy=frozen_copy)).parameters(), lr=1e-4
        )
        model(torch.randn(64, 128)).square().mean().backward()
        optimizer.step()
        change = model(torch.eye(128)).T - model[0].weight
        sizes[frozen_copy] = float((change.norm() / model[0].weight.norm()).detach())
    assert sizes[True] < 0.1 * sizes[False]


def test_parity_with_peft() -> None:
    peft = pytest.importorskip("peft")
    layer, x = filled(ll.DeLoRAConfig(r=4, lambda0=3.0, frozen_copy=False), torch.float32)
    layer.lora_lambda.data.fill_(0.5)
    theirs, inner = peft_twin(layer, peft.DeloraConfig(r=4, delora_lambda=3.5, target_modules=["0"]))
    A, B, strength = inner.delora_A["default"], inner.delora_B["default"], inner.delora_lambda["default"]
    A.data, B.data = layer.lora_A.data.clone(), layer.lora_B.data.clone()
    ours, expected = layer(x), theirs(x)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    gradients = (
        torch.autograd.grad(ours.square().mean(), (layer.lora_A, layer.lora_B, layer.lora_lambda)),
        torch.autograd.grad(expected.square().mean(), (A, B, strength)),
    )
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape), rtol=1e-4, atol=1e-5)


def test_strength_must_be_positive() -> None:
    with pytest.raises(ll.ConfigError, match=r"DeLoRAConfig\(lambda0=0\): the strength is a number above 0"):
        ll.DeLoRAConfig(lambda0=0)
