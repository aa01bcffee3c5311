"""LoRA-FA: its forward is LoRA's, its gradient the best one can do with B alone, and that of the peft package."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll
from tests.oracles import D_IN, D_OUT, assert_same, filled, peft_twin

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:peft")


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_formula(alpha: float | None) -> None:
    layer, x = filled(ll.LoraLiteConfig(variant="lora_fa", r=4, alpha=alpha))
    assert not layer.lora_A.requires_grad
    B = layer.lora_B.detach().clone().requires_grad_()
    expected = F.linear(x, layer.weight + (alpha or 4) / 4 * B @ layer.lora_A, layer.bias)
    assert_same(layer, x, expected, {"lora_B": B}, 1e-10)


def step(layer: Any, x: Tensor, optimizer: Any) -> Tensor:
    """The gradient of B as the optimizer got it."""
    layer(x).square().mean().backward()
    optimizer.step()
    return layer.lora_B.grad


@pytest.mark.parametrize("alpha", [None, 8.0])
def test_the_rewritten_gradient_is_the_best_approximation(alpha: float | None) -> None:
    """argmin over g of ‖s · (step along g, in the weight) − gradient of the weight‖, by least squares."""
    model = nn.Sequential(nn.Linear(D_IN, D_OUT)).double()
    adapter = ll.attach(model, ll.LoraLiteConfig(variant="lora_fa", r=4, alpha=alpha))
    layer = model[0]
    nn.init.normal_(layer.lora_B)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.0)
    ll.follow(model, optimizer)
    x, scale = torch.randn(9, D_IN, dtype=torch.float64), (alpha or 4) / 4
    W = (layer.weight + scale * layer.lora_B @ layer.lora_A).detach().requires_grad_()
    F.linear(x, W, layer.bias).square().mean().backward()
    assert W.grad is not None
    A = layer.lora_A.detach()
    best = torch.linalg.lstsq(scale * A.T, W.grad.T).solution.T  # of s g A ≈ G
    torch.testing.assert_close(step(layer, x, optimizer), best, rtol=1e-6, atol=1e-9)


def test_the_gradient_is_that_of_peft() -> None:
    from peft import LoraConfig
    from peft.optimizers import create_lorafa_optimizer

    layer, x = filled(ll.LoraLiteConfig(variant="lora_fa", r=4, alpha=8.0), torch.float32)
    theirs, inner = peft_twin(layer, LoraConfig(r=4, lora_alpha=8, target_modules=["0"]))
    A, B = inner.lora_A["default"].weight, inner.lora_B["default"].weight
    A.data, B.data = layer.lora_A.data.clone(), layer.lora_B.data.clone()
    optimizer = create_lorafa_optimizer(model=theirs, r=4, lora_alpha=8, lr=1e-3)
    theirs(x.detach()).square().mean().backward()
    optimizer.step()
    (state,) = [state for state in optimizer.state.values() if "exp_avg_B" in state]
    layer(x.detach()).square().mean().backward()
    plain, target = layer.lora_B.grad.clone(), type("T", (), {})()
    target.params, target.cfg = dict(layer.named_parameters()), ll.LoraLiteConfig(variant="lora_fa", r=4, alpha=8.0)
    ll.get_variant("lora_fa").before_step({"targets": (target,), "cfg": target.cfg, "step": 0})  # type: ignore[misc]
    assert not torch.allclose(plain, layer.lora_B.grad, rtol=0.1)
    expected = state["exp_avg_B"] / 0.1  # theirs multiplies in bfloat16
    torch.testing.assert_close(layer.lora_B.grad, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


def test_a_layer_without_a_gradient_is_passed_over() -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT), nn.Linear(D_OUT, D_IN))
    adapter = ll.attach(model, ll.LoraLiteConfig(variant="lora_fa", r=4))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.0)
    ll.follow(model, optimizer)
    model[0](torch.randn(3, D_IN)).square().mean().backward()
    optimizer.step()
    assert float(model[0].lora_B.detach().abs().max()) > 0
    assert float(model[1].lora_B.detach().abs().max()) == 0


def test_without_follow_it_is_a_lora_with_a_frozen_factor() -> None:
    layer, x = filled(ll.LoraLiteConfig(variant="lora_fa", r=4))
    B = layer.lora_B.detach().clone().requires_grad_()
    F.linear(x.detach(), layer.weight + B @ layer.lora_A, layer.bias).square().mean().backward()
    torch.testing.assert_close(step(layer, x.detach(), torch.optim.SGD([layer.lora_B], lr=0.0)), B.grad)
