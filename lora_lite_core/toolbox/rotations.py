"""Skew-symmetric matrices, the rotations that Cayley's transform makes of them, and not making them twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary


def skew(entries: Tensor, b: int) -> Tensor:
    """Skew-symmetric (..., b, b) matrices from their strict upper triangles (..., b(b−1)/2), row by row."""
    rows, columns = torch.triu_indices(b, b, 1, device=entries.device)
    flat = entries.new_zeros(*entries.shape[:-1], b * b)
    upper = flat.index_copy(-1, rows * b + columns, entries).unflatten(-1, (b, b))
    return upper - upper.mT


def cayley_offset(X: Tensor) -> Tensor:
    """R − I of the rotation R = (I − X)⁻¹ (I + X), for skew-symmetric X (..., b, b); exactly zero at X = 0.

    Closed forms for b = 2 and, by its characteristic polynomial X⁴ + s X² + p² I = 0, for b = 4 (s: sum of the squared
    upper entries, p: Pfaffian); a batched inverse otherwise. Give it at least float32.
    """
    b = X.shape[-1]
    if b == 2:
        t = X[..., 0, 1, None, None]
        return 2 * (X - t * t * torch.eye(2, dtype=X.dtype, device=X.device)) / (1 + t * t)
    if b == 4:
        s = (X * X).sum((-2, -1), keepdim=True) / 2
        p = X[..., 0, 1] * X[..., 2, 3] - X[..., 0, 2] * X[..., 1, 3] + X[..., 0, 3] * X[..., 1, 2]
        p2 = (p * p)[..., None, None]
        X2 = X @ X
        identity = torch.eye(4, dtype=X.dtype, device=X.device)
        return 2 * (X @ X2 + X2 + (1 + s) * X - p2 * identity) / (1 + s + p2)
    identity = torch.eye(b, dtype=X.dtype, device=X.device)
    # R = 2 (I − X)⁻¹ − I. The singular values of I − X are at least 1: its inverse loses nothing and needs no check.
    return 2 * (torch.linalg.inv_ex(identity - X).inverse - identity)


def remembered(make: Callable[..., Tensor], parameter: Tensor, *more: Any) -> Tensor:
    """make(parameter, *more): a rotation, say, that is dear for a single token. On a processor and without gradients it
    is the tensor of the last call, as long as the parameter holds the same numbers and `more` is the same: they are
    compared with a copy at every call, so that it does not matter who writes a parameter, and how.

    `make` looks at nothing else, and the result must not be written. Kept are one copy and one result a parameter,
    beside the model: they are in no copy and no file of it, and go when the parameter goes.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return make(parameter, *more)
    if type(parameter) is not nn.Parameter or parameter.device.type != "cpu":  # a GPU would have to be waited for
        return make(parameter, *more)
    seen = _REMEMBERED.get(parameter)
    if seen is None or seen[:3] != (make, more, parameter.dtype) or not torch.equal(seen[3], parameter):
        copy = parameter.detach().clone()  # before: another thread may write meanwhile
        seen = _REMEMBERED[parameter] = (make, more, copy.dtype, copy, make(copy, *more))
    made: Tensor = seen[4]
    return made


_REMEMBERED: Any = WeakIdKeyDictionary()
