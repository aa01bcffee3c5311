"""Rotations that are not made anew for every token: always those of the numbers that the parameter holds."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite_core.toolbox import rotations

CONFIGS: dict[str, Any] = {
    "oft": lambda: ll.OFTConfig(block_size=4),
    "oft, bounded": lambda: ll.OFTConfig(block_size=4, coft=True, eps=1e-2),
    "boft": lambda: ll.BOFTConfig(block_size=4, factors=2),
    "antipasto": lambda: ll.AntiPaSTOConfig(r=8, rotate_basis="both"),
    "ssvd": lambda: ll.SSVDConfig(r=4),
}


class Counted:
    """Twice the parameter, and how often it was asked for."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, parameter: Tensor, factor: int = 2) -> Tensor:
        self.calls += 1
        return factor * parameter


def test_made_once_without_gradients_and_anew_after_any_write() -> None:
    make, parameter = Counted(), nn.Parameter(torch.ones(3))
    with torch.no_grad():
        first = ll.remembered(make, parameter)
        assert ll.remembered(make, parameter) is first
        assert make.calls == 1
        parameter.add_(1)
        assert ll.remembered(make, parameter).tolist() == [4, 4, 4]
        parameter.data.fill_(3)  # which no version counts
        assert ll.remembered(make, parameter).tolist() == [6, 6, 6]
        parameter.data = torch.full((3,), 4.0)
        assert ll.remembered(make, parameter).tolist() == [8, 8, 8]
        parameter.detach().numpy()[:] = 5
        assert ll.remembered(make, parameter).tolist() == [10, 10, 10]
        assert ll.remembered(make, parameter, 3).tolist() == [15, 15, 15]
        assert ll.remembered(make, parameter.data.bfloat16().requires_grad_()).dtype == torch.bfloat16
        parameter.data = parameter.data.double()
        assert ll.remembered(make, parameter, 3).dtype == torch.float64
        parameter.data.fill_(float("nan"))
        assert bool(ll.remembered(make, parameter, 3).isnan().all())


def test_gradients_are_those_of_this_call() -> None:
    make, parameter = Counted(), nn.Parameter(torch.ones(3))
    with torch.inference_mode():
        ll.remembered(make, parameter)
    ll.remembered(make, parameter).sum().backward()
    ll.remembered(make, parameter).sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [4, 4, 4]
    assert make.calls == 3


def test_it_goes_with_the_parameter() -> None:
    parameter = nn.Parameter(torch.ones(3))
    before = len(rotations._REMEMBERED)
    with torch.no_grad():
        ll.remembered(Counted(), parameter)
    assert len(rotations._REMEMBERED) == before + 1
    del parameter
    gc.collect()
    assert len(rotations._REMEMBERED) == before


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_follow_their_parameters(name: str) -> None:
    """In eval mode without gradients a layer gives what it gives with them, whatever is written in between, and so do
    its copies."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 24)), torch.randn(1, 16)
    adapter = ll.attach(model, CONFIGS[name]())
    for _ in range(3):
        for parameter in adapter.parameters():
            parameter.data.normal_(std=0.2)
        for one in (model, model, copy.deepcopy(model)):
            with torch.no_grad():
                quick = one(x)
            torch.testing.assert_close(quick, one(x).detach(), rtol=0, atol=1e-6)
