"""AdaLoRA and LoRA-FA beside the peft package's: forward, gradients, the budget's schedule, a projected step."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lora_lite as ll

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's own
X = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 12))


def copied(pairs: dict[Any, Any]) -> None:
    with torch.no_grad():
        for theirs, ours in pairs.items():
            theirs.copy_(ours.reshape(theirs.shape))


def test_adalora_is_that_of_peft() -> None:
    ours = net()
    adapter = ll.attach(ours, ll.LoraLiteConfig(variant="adalora", r=4, alpha=8.0))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    cfg = peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=8, target_modules=["0", "2"], total_step=100, tinit=0)
    theirs = peft.get_peft_model(net(), cfg)
    pairs: dict[Any, Any] = {}
    for name, target in adapter.layers().items():
        inner: Any = theirs.base_model.model.get_submodule(name)
        p = target.params
        pairs |= {
            inner.lora_A["default"]: p["lora_Q"],
            inner.lora_E["default"]: p["lora_l"],
            inner.lora_B["default"]: p["lora_P"],
        }
    copied(pairs)
    y, expected = ours(X), theirs(X)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)  # theirs divides by r + 1e-5
    y.square().mean().backward()
    expected.square().mean().backward()
    for parameter, mine in pairs.items():
        torch.testing.assert_close(mine.grad, parameter.grad.reshape(mine.shape), rtol=1e-3, atol=1e-5)


def test_lora_fas_step_is_that_of_peft() -> None:
    from peft.optimizers import create_lorafa_optimizer

    ours = net()
    adapter = ll.attach(ours, ll.LoraLiteConfig(variant="lora_fa", r=4, alpha=8.0))
    theirs = peft.get_peft_model(net(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]))
    pairs: dict[Any, Any] = {}
    for name, target in adapter.layers().items():
        inner: Any = theirs.base_model.model.get_submodule(name)
        nn.init.normal_(target.params["lora_B"], std=0.1)
        pairs |= {
            inner.lora_A["default"].weight: target.params["lora_A"],
            inner.lora_B["default"].weight: target.params["lora_B"],
        }
    copied(pairs)
    mine = torch.optim.AdamW(adapter.parameters(), lr=1e-2, eps=1e-6, weight_decay=0.0)
    ll.follow(ours, mine)
    other = create_lorafa_optimizer(model=theirs, r=4, lora_alpha=8, lr=1e-2)
    goal = copy.deepcopy(net())(X.flip(0)).detach()
    for _ in range(3):
        for model, optimizer in ((ours, mine), (theirs, other)):
            (model(X) - goal).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for parameter, tensor in pairs.items():
        torch.testing.assert_close(tensor.detach(), parameter.detach(), rtol=1e-2, atol=1e-3)
