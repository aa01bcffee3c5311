"""A clamp that does not become a one-way door."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Clamp(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        return value.clamp(0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (value,) = ctx.saved_tensors
        outward = ((value < 0) & (grad > 0)) | ((value > 1) & (grad < 0))  # a step goes against the gradient
        return grad.masked_fill(outward, 0)


def clamp_01(value: Tensor) -> Tensor:
    """Clamped to [0, 1]. Outside, the gradient that would lead further out is dropped and the one that leads back is
    kept, where that of torch.clamp is zero for good. Which of the two it is, is seen for each call: outside, gradients
    of parts of a batch do not add up to that of the batch."""
    result: Tensor = _Clamp.apply(value)  # pyright: ignore[reportAssignmentType, reportUnknownMemberType]
    return result
