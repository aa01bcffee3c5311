"""The low-rank arithmetic that several plugin packages share."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..layers.kinds.embedding import project


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
