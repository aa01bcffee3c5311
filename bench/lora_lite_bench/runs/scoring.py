"""Scores and losses of a split, in parts that fit, shared among the processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from ..machine.memory import AtOnce
from ..machine.processes import processes
from ..machine.stopping import go_on
from ..tasks import Batch, Split, Task, rows
from .training import on_device, parts

T = TypeVar("T")


@torch.no_grad()
def scores(task: Task, model: nn.Module, processor: Any, split: Split) -> list[float]:
    """Of each example of a split."""

    def of(part: Batch) -> list[float]:
        return task.correct(model, processor, on_device(part, model)).float().cpu().tolist()

    return [value for values in _each(task, model, processor, split, of) for value in values]


def score(task: Task, model: nn.Module, processor: Any, split: Split) -> float | None:
    """The mean score of a split."""
    return mean(scores(task, model, processor, split))


def mean(found: list[float]) -> float | None:
    """The mean score; None where a task has no such examples."""
    return torch.tensor(found).mean().item() if found else None


@torch.no_grad()
def valid_loss(task: Task, model: nn.Module, processor: Any) -> float:
    """The mean loss over "valid"; 1e9 where that is not finite."""

    def of(part: Batch) -> tuple[float, float]:
        return task.weight(part), task.loss(model, on_device(part, model)).item()

    found = _each(task, model, processor, "valid", of)
    mean = sum(weight * loss for weight, loss in found) / sum(weight for weight, _ in found)
    return mean if math.isfinite(mean) else 1e9


def _each(task: Task, model: nn.Module, processor: Any, split: Split, work: Callable[[Batch], T]) -> list[T]:
    """What `work` makes of each part of a split, of all processes."""
    model.eval()
    at_once, found = AtOnce(2**30), list[T]()
    for batch in task.batches(processor, split, 0):
        mine = batch if processes().count == 1 else task.part(batch, processes().share(rows(batch)))
        if not rows(mine):
            continue
        go_on()
        at_once.size = min(at_once.size, rows(mine))
        found += at_once.attempt(lambda size, mine=mine: [work(part) for part in parts(task, mine, size)])
    return processes().gathered(found)
