"""Products with low-rank and sparse matrices, that several plugin packages share."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layers.kinds.embedding import project

FEW_ROWS = 8  # below: entry by entry
WORTH = 3 * 2**19  # measured: shares of 1/8 to 1/128 of 512² to 2048² entries, 16 to 2048 rows; where equal, as fast


def lowrank_delta(x: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """scale · B(A x): x (..., d_in), A (r, d_in), B (d_out, r) → (..., d_out) in x's dtype, or autocast's. Of an
    embedding x are token ids (...,), and the result is in A's dtype.

    The factors are cast to x's dtype for the two matmuls; gradients reach them in their own. The result is a tensor of
    its own: `.add_(y)` makes y + delta of it without the memory of a third.
    """
    hidden = project(x, A)
    if scale != 1.0:
        hidden = hidden * scale
    return F.linear(hidden, B.to(hidden.dtype))


def sparse_delta(x: Tensor, places: Tensor, values: Tensor, d_out: int) -> Tensor:
    """S x for S (d_out, d_in) that is zero but for `values` (n,) at `places` (n,), row · d_in + column in any order;
    entries at one place add up. x (..., d_in) → (..., d_out) in x's dtype, or autocast's; a tensor of its own.

    On a processor in float32 or float64, a sparse S is not made: n multiply-accumulates per token, and as many for each
    of the two gradients, where the matrix would take d_in d_out. Else it is a product with the matrix.
    """
    values, d_in = values.to(x.dtype), x.shape[-1]
    rows = x.numel() // max(1, d_in)
    if not _is_plain(x) or 8 * len(values) > d_in * d_out:
        return project(x, _matrix(places, values, d_out, d_in))
    if rows < FEW_ROWS:
        entries = x.index_select(-1, places % d_in) * values
        return x.new_zeros(*x.shape[:-1], d_out).index_add(-1, places // d_in, entries)
    if WORTH * len(values) > rows * (d_in * d_out) ** 1.5:  # putting the entries in order takes longer than it saves
        return project(x, _matrix(places, values, d_out, d_in))
    product: Tensor = _SparseProduct.apply(x, places, values, d_out)
    return product


def _is_plain(x: Tensor) -> bool:
    """Whether the kernels for sparse products serve it, and torch.compile is not to make better ones."""
    of = type(x) is Tensor and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    return of and not torch.compiler.is_compiling()


def _matrix(places: Tensor, values: Tensor, d_out: int, d_in: int) -> Tensor:
    return values.new_zeros(d_out * d_in).scatter_add_(0, places, values).view(d_out, d_in)


class _SparseProduct(torch.autograd.Function):
    """S x. It keeps x and the entries for backward, not S."""

    @staticmethod
    def forward(x: Tensor, places: Tensor, values: Tensor, d_out: int) -> Tensor:
        made = x.new_empty(*x.shape[:-1], d_out)  # a view could not be added to in place
        made.view(-1, d_out).copy_(_summed(_columns(x), places, values, d_out).T)
        return made

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.d_out = inputs[3]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,), (x, places, values) = gradients, ctx.saved_tensors
        d_out, d_in = ctx.d_out, x.shape[-1]
        if torch.is_grad_enabled():  # gradients of these gradients are wanted
            of_x = gradient @ _matrix(places, values, d_out, d_in)
            return of_x, None, (gradient.flatten(0, -2).T @ x.flatten(0, -2)).flatten()[places], None
        of_x, of_values, columns = None, None, _columns(gradient)
        if ctx.needs_input_grad[0]:
            of_x = _summed(columns, places % d_in * d_out + places // d_in, values, d_in).T.reshape(x.shape)
        if ctx.needs_input_grad[2]:
            of_values = _sampled(columns, x.reshape(-1, d_in), places)
        return of_x, None, of_values, None


def _columns(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).T.contiguous()


def _ordered(places: Tensor) -> tuple[Tensor, Tensor | None]:
    """In their order, and which is where; None where they are in it, which is found out in a fifth of the time."""
    return (places, None) if bool((places[1:] >= places[:-1]).all()) else places.sort()


def _summed(columns: Tensor, places: Tensor, values: Tensor, d_out: int) -> Tensor:
    """(S x)ᵀ (d_out, rows) of columns (d_in, rows), which are xᵀ."""
    d_in, (places, order) = len(columns), _ordered(places)
    if len(places) and not 0 <= int(places[0]) <= int(places[-1]) < d_out * d_in:
        raise IndexError(f"places from {int(places[0])} to {int(places[-1])} are not in a ({d_out}, {d_in}) matrix")
    starts = torch.searchsorted(places, torch.arange(0, d_out * d_in, d_in))
    weights = values if order is None else values[order]
    return F.embedding_bag(places % d_in, columns, starts, mode="sum", per_sample_weights=weights)


def _sampled(columns: Tensor, x: Tensor, places: Tensor) -> Tensor:
    """The entries at these places of columns (d_out, rows) times x (rows, d_in), without the others."""
    (d_out, d_in), (places, order) = (len(columns), x.shape[1]), _ordered(places)
    starts = torch.searchsorted(places, torch.arange(0, d_out * d_in + 1, d_in))
    _expect_sparse()
    zeros = x.new_zeros(len(places))
    pattern = torch.sparse_csr_tensor(starts, places % d_in, zeros, (d_out, d_in), check_invariants=False)
    found = torch.sparse.sampled_addmm(pattern, columns, x, beta=0.0).values()
    return found if order is None else torch.empty_like(found).index_copy_(0, order, found)


@functools.cache
def _expect_sparse() -> None:
    """Have torch say once in this process that its sparse tensors are in beta, to nobody."""
    empty = torch.tensor([], dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), empty, empty.float(), (1, 1), check_invariants=False)
