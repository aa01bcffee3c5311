"""Which rows of a product with fused experts belong to which expert, and a variant's hook run on each expert's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Run = Callable[[Any, Tensor, "Tensor | None"], Tensor]  # on one expert's number and rows


@dataclass(frozen=True)
class Rows:
    """The rows of one product, all of one expert.

    `flat` and `shaped` bring what the call takes and gives into rows (S, d), and back.
    """

    experts: Any = None  # a number, a tensor with one or with one for every row, or with the end of every expert's rows

    def flat(self, tensor: Tensor) -> Tensor:
        return tensor

    def shaped(self, rows: Tensor, like: Tensor) -> Tensor:
        return rows if rows.shape == like.shape else rows.reshape(like.shape)

    def each(self, count: int, hook: Run, x: Tensor, y: Tensor | None) -> Tensor:
        index = self.experts
        if isinstance(index, Tensor) and not torch.compiler.is_compiling():
            index = int(index)
        return hook(index, x, y)


class Stacked(Rows):
    """(E, n, d): the first dimension is the experts'."""

    def each(self, count: int, hook: Run, x: Tensor, y: Tensor | None) -> Tensor:
        made = [hook(index, x[index], None if y is None else y[index]) for index in range(count)]
        return torch.stack(made)


class Grouped(Rows):
    """Rows in the order of their experts; what comes after the last one's belongs to none."""

    def each(self, count: int, hook: Run, x: Tensor, y: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling():
            numbers = torch.arange(len(x), device=x.device, dtype=self.experts.dtype)
            return _masked(torch.searchsorted(self.experts, numbers, right=True), count, hook, x, y)
        return _sliced(self.experts.tolist(), hook, x, y)


class Gathered(Rows):
    """Every row says which expert it belongs to; the call has them with a dimension of 1 beside."""

    def flat(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(len(tensor), -1)

    def each(self, count: int, hook: Run, x: Tensor, y: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling():
            return _masked(self.experts, count, hook, x, y)
        numbers, order = torch.sort(self.experts, stable=True)
        ends = torch.bincount(numbers, minlength=count).cumsum(0).tolist()
        made = _sliced(ends, hook, x[order], None if y is None else y[order])
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return made[back]


def rows_for(name: str, experts: Any, x: Tensor, ends: Any) -> Rows | None:
    """The rows of a call of this name with the weights of these experts (None: all); None where it is not known."""
    if isinstance(ends, Tensor):
        return Grouped(ends) if experts is None and x.dim() == 2 else None
    if experts is None:
        return Stacked() if name in ("bmm", "matmul", "__matmul__") and x.dim() == 3 else None
    if isinstance(experts, int) or experts.dim() == 0:
        return Rows(experts)
    if name in ("bmm", "matmul", "__matmul__") and experts.dim() == 1 and x.dim() == 3 and 1 in x.shape[1:]:
        return Gathered(experts)
    return None


def _sliced(ends: list[int], hook: Run, x: Tensor, y: Tensor | None) -> Tensor:
    made: list[Tensor] = []
    start = 0
    for index, end in enumerate(ends):
        if end > start:
            made.append(hook(index, x[start:end], None if y is None else y[start:end]))
        start = max(start, end)
    if start < len(x):
        made.append((x if y is None else y)[start:])
    return torch.cat(made) if made else (x if y is None else y)


def _masked(numbers: Tensor, count: int, hook: Run, x: Tensor, y: Tensor | None) -> Tensor:
    """Every expert on all rows, of which it keeps its own: shapes that do not depend on the routing, to be compiled."""
    made = x if y is None else y
    for index in range(count):
        mine = (numbers == index)[:, None]
        made = torch.where(mine, hook(index, x, y), made)
    return made
