"""Models so small that an operation on them takes a millisecond, with something of everything that must stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


class Small(nn.Module):
    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, nn.Linear(8, 8)
        self.head = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.tanh(self.first(x))))


def observe(*_: Any) -> None:
    """A hook of the user's."""


def base(first: type[nn.Module] = nn.Linear) -> Small:
    """With flags, a gradient and hooks of its own that must stay."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Small(first(8, 8)).eval()
        for tensor in (model.head.weight, model.head.bias, model.head.running_mean):
            nn.init.normal_(tensor)
    model.second.train()
    model.second.bias.requires_grad_(False)
    model.head.weight.grad = torch.ones(8)
    model.head.register_forward_hook(observe)
    model.head.register_forward_pre_hook(observe)
    return model


def observed() -> Small:
    """With hooks on the targets, too."""
    model = base()
    model.first.register_forward_hook(observe, with_kwargs=True)
    model.second.register_forward_pre_hook(observe)
    return model


def conv1d() -> Small:
    return base(pytest.importorskip("transformers.pytorch_utils").Conv1D)


def quantised() -> Small:
    """As on a processor with AVX512-BF16, and before its first forward pass."""
    model = base(pytest.importorskip("bitsandbytes").nn.Linear4bit)
    model.first.to("cpu")
    model.first.support_avx512bf16_for_cpu = True
    return model


def trained(model: nn.Module, *adapters: tuple[str, ll.AdapterConfig]) -> nn.Module:
    """With adapters that have moved, and heads that are trained."""
    for seed, (name, cfg) in enumerate(adapters):
        generator = torch.Generator().manual_seed(seed)
        for p in ll.attach(model, cfg, name=name).parameters():
            p.data.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return model


class Fused(nn.Module):
    """Two layers in one parameter, the mean of which is returned."""

    is_transposed = False

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.fused = nn.Parameter(torch.randn(2, d_out, d_in) / d_in**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (nn.functional.linear(x, self.fused[0]) + nn.functional.linear(x, self.fused[1])) / 2


def experts() -> Small:
    return base(Fused)
