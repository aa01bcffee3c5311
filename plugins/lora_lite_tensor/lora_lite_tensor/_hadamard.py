"""The product with a matrix that is the entry-by-entry product of two low-rank ones, block by block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SMALL = 2**18  # up to so many entries what backward needs is kept: to make it anew would take up to a tenth longer
BLOCK = 2**17  # entries that are made at a time: what a processor's cache holds


def hadamard_delta(x: Tensor, A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor) -> Tensor:
    """((B1 A1) ⊙ (B2 A2)) x: x (..., d_in), A (r, d_in), B (d_out, r) → (..., d_out) in x's dtype, or autocast's; a
    tensor of its own.

    Of a large matrix nothing is kept for backward, which makes it anew, 2 r d_in d_out multiply-accumulates; its two
    factors are there a block at a time.
    """
    if len(B1) * x.shape[-1] <= SMALL or type(x) is not Tensor or torch.compiler.is_compiling():
        return _whole(x, A1, B1, A2, B2)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, A1, B1, A2, B2 = (tensor.to(dtype) for tensor in (x, A1, B1, A2, B2))
    product: Tensor = _Product.apply(x, A1, B1, A2, B2)  # pyright: ignore[reportAssignmentType, reportUnknownMemberType]
    return product


def _whole(x: Tensor, A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor) -> Tensor:
    return F.linear(x, (B1 @ A1 * (B2 @ A2)).to(x.dtype))


def _blocks(rows: int, columns: int) -> list[slice]:
    size = max(1, BLOCK // max(1, columns))
    return [slice(start, start + size) for start in range(0, rows, size)]


class _Product(torch.autograd.Function):
    """It keeps x and the four for backward."""

    @staticmethod
    def forward(x: Tensor, A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor) -> Tensor:
        matrix = x.new_empty(len(B1), x.shape[-1])
        for rows in _blocks(*matrix.shape):
            torch.mul(B1[rows] @ A1, B2[rows] @ A2, out=matrix[rows])
        return F.linear(x, matrix)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,), (x, *factors) = gradients, ctx.saved_tensors
        of = _gradients if torch.is_grad_enabled() else _gradients_in_blocks  # gradients of these gradients are wanted
        with torch.autocast(x.device.type, enabled=False):
            of_x, *others = of(_rows(gradient), _rows(x), *factors)
        return of_x.view(x.shape), *others

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[Tensor, int]:
        return torch.func.vmap(_whole, in_dims, randomness=info.randomness)(*tensors), 0


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _gradients(gradient: Tensor, x: Tensor, A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor) -> tuple[Tensor, ...]:
    first, second, of_matrix = B1 @ A1, B2 @ A2, (gradient.T @ x).to(B1.dtype)
    of_first, of_second = of_matrix * second, of_matrix * first
    of_x = gradient @ (first * second).to(x.dtype)
    return of_x, B1.T @ of_first, of_first @ A1.T, B2.T @ of_second, of_second @ A2.T


def _gradients_in_blocks(
    gradient: Tensor, x: Tensor, A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor
) -> tuple[Tensor, ...]:
    of_matrix, matrix = gradient.T @ x, x.new_empty(len(B1), x.shape[1])
    sums = torch.promote_types(A1.dtype, torch.float32)
    of_A1, of_A2 = (torch.zeros_like(tensor, dtype=sums) for tensor in (A1, A2))
    of_B1, of_B2 = torch.empty_like(B1), torch.empty_like(B2)
    for rows in _blocks(*matrix.shape):
        b1, b2, of = B1[rows], B2[rows], of_matrix[rows].to(A1.dtype)
        first, second = b1 @ A1, b2 @ A2
        torch.mul(first, second, out=matrix[rows])
        each = (b1, A1, second.mul_(of), of_A1, of_B1), (b2, A2, first.mul_(of), of_A2, of_B2)
        for b, A, of_one, of_A, of_B in each:
            torch.mm(of_one, A.T, out=of_B[rows])
            if of_A.dtype == of_one.dtype:
                of_A.addmm_(b.T, of_one)
            else:
                of_A.add_(b.T @ of_one)
    return gradient @ matrix, of_A1.to(A1.dtype), of_B1, of_A2.to(A2.dtype), of_B2
