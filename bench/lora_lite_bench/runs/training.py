"""Training: a task's batches through a model by its recipe, in parts where memory or processes ask for it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_map

import lora_lite_core as ll

from ..machine.memory import AtOnce
from ..machine.processes import processes
from ..machine.stopping import go_on
from ..tasks import Batch, Recipe, Task, rows
from ..tasks.language.base_model import schedule
from .unfinished import State

HOPELESS = 3.0  # a run whose loss is not finite, or this many times its first, is stopped


class Training:
    """The training of one model.

    adapted     whether adapters are trained; else `parameters` are the base's own
    place       the folder in which states to go on from are kept; None keeps none
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        parameters: list[nn.Parameter],
        *,
        adapted: bool,
        lr: float,
        steps: int,
        place: Path | None = None,
    ) -> None:
        self.task, self.model, self.parameters, self.adapted, self.steps = task, model, parameters, adapted, steps
        self.recipe = task.recipe()
        self.optimizer = torch.optim.AdamW(_groups(model, parameters, adapted, lr, self.recipe), lr=lr)
        self.scheduler = _schedule(self.optimizer, steps, self.recipe)
        self.at_once = AtOnce(self.recipe.at_once or 2**30)
        self.losses: list[float] = []
        self.seconds = 0.0
        self.stopped = ""
        self._state = State(self, place)
        if adapted:
            ll.follow(model, self.optimizer)

    def carry_out(self, processor: Any, seed: int, advance: Callable[[], None]) -> None:
        """All steps that are left; a state that was kept is gone on from. `advance` is called once a step."""
        self._state.restore()
        begin, done = time.perf_counter() - self.seconds, len(self.losses)
        for _ in range(done):
            advance()
        self.model.train()
        for batch in islice(self.task.batches(processor, "train", seed), done, self.steps):
            go_on()
            loss = self._step(batch)
            self.losses.append(round(loss, 5))
            self.seconds = time.perf_counter() - begin
            advance()
            if self._hopeless():
                break
            if self.recipe.save_every and (
                len(self.losses) % self.recipe.save_every == 0 or len(self.losses) == self.steps
            ):
                self._state.keep()
        self.model.eval()

    def _hopeless(self) -> bool:
        first, last = self.losses[0], self.losses[-1]
        if last <= HOPELESS * first:
            return False
        self.stopped = f"loss {first:.3g} had become {last:.3g} at step {len(self.losses)}"
        self.losses[-1] = last if math.isfinite(last) else 1e9
        return True

    def _step(self, batch: Batch) -> float:
        """One step of the optimizer; the loss of the whole batch."""
        whole = self.task.weight(batch)
        share = processes().share(rows(batch))
        mine = batch if processes().count == 1 else self.task.part(batch, share)
        self.at_once.size = min(self.at_once.size, max(1, rows(mine)))
        loss = self.at_once.attempt(lambda size: self._gradients(mine, size, whole), self.optimizer.zero_grad)
        if processes().count > 1:
            processes().add_gradients(self.parameters)
            loss = sum(processes().gathered([loss]))
        if self.recipe.clip:
            nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return loss

    def _gradients(self, batch: Batch, size: int, whole: float) -> float:
        """Of this process's part of a batch, so many examples at once; its part of the loss, without penalties."""
        found = 0.0
        for part in parts(self.task, batch, size):
            loss = self.task.loss(self.model, on_device(part, self.model))
            loss = loss * (self.task.weight(part) / whole)
            loss.backward()
            found += loss.item()
        if self.adapted:
            penalty = ll.penalty(self.model)
            if penalty.requires_grad:
                (penalty / processes().count).backward()
        return found


def parts(task: Task, batch: Batch, size: int) -> list[Batch]:
    """The batch in parts of at most `size` examples."""
    count = rows(batch)
    if 0 < count <= size:
        return [batch]
    return [task.part(batch, slice(start, start + size)) for start in range(0, count, size)]


def on_device(batch: Any, model: nn.Module) -> Any:
    device = next(model.parameters()).device
    return tree_map(lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, batch)


def _groups(
    model: nn.Module, parameters: list[nn.Parameter], adapted: bool, lr: float, recipe: Recipe
) -> list[dict[str, Any]]:
    if adapted:
        return ll.param_groups(model, lr=lr, weight_decay=recipe.weight_decay)
    flat = [p for p in parameters if p.dim() == 1]
    groups = [([p for p in parameters if p.dim() != 1], recipe.weight_decay), (flat, 0.0)]
    return [{"params": found, "weight_decay": decay} for found, decay in groups if found]


def _schedule(optimizer: torch.optim.Optimizer, steps: int, recipe: Recipe) -> LRScheduler:
    if recipe.schedule == "constant":
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return schedule(optimizer, steps)
