"""What a method costs on a task: measured on the models, beside the frozen one, without training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..machine.costs import PeakMemory, added_macs_per_token, step_times
from ..machine.memory import AtOnce
from ..tasks import Batch, Task, rows
from .methods import ANCHORS
from .run import Job, Result, fresh, put
from .training import on_device


@dataclass
class Costs:
    """What a method costs on this machine, measured alone and turn by turn with the frozen model.

    added_macs_per_token  of matrix products; a token is a row that an adapted layer sees
    *_ms                  medians; of the frozen model, the backward pass goes from the output to the embeddings
    peak_mb               10⁶ bytes of tensors that come into being during a first training step
    examples              of one training batch, as many as memory has room for: what *_ms and peak_mb are of
    """

    trainable: int = 0
    added_macs_per_token: float = 0.0
    forward_ms: float = 0.0
    backward_ms: float = 0.0
    frozen_forward_ms: float = 0.0
    frozen_backward_ms: float = 0.0
    init_s: float = 0.0
    peak_mb: float = 0.0
    examples: int = 0

    @property
    def ratio(self) -> float:
        """Of forward and backward together to the frozen model's."""
        return (self.forward_ms + self.backward_ms) / (self.frozen_forward_ms + self.frozen_backward_ms)


def measure(job: Job) -> Costs:
    """The costs of a job's method on its task, without training."""
    task = job.make_task()
    model, processor = fresh(task)
    result = Result()
    parameters = put(job, task, model, processor, result)
    batch = on_device(next(task.batches(processor, "train", job.seed)), model)
    frozen, _ = fresh(task)
    frozen.requires_grad_(False)
    _let_gradients_through(frozen)
    if not parameters:
        _let_gradients_through(model)
    costs = Costs(trainable=sum(p.numel() for p in parameters), init_s=result.init_s)
    if job.method not in ANCHORS:
        costs.added_macs_per_token = added_macs_per_token(model, task.inputs(batch))
    model.train()
    frozen.train()
    at_once = AtOnce(rows(batch))
    at_once.attempt(lambda size: _first_step(job, task, model, parameters, task.part(batch, slice(size)), costs))
    batch = task.part(batch, slice(at_once.size))
    ours, base = step_times([lambda: task.loss(model, batch), lambda: task.loss(frozen, batch)])
    costs.forward_ms, costs.backward_ms = ours
    costs.frozen_forward_ms, costs.frozen_backward_ms = base
    costs.examples = at_once.size
    return costs


def _first_step(
    job: Job, task: Task, model: nn.Module, parameters: list[nn.Parameter], batch: Batch, costs: Costs
) -> None:
    with PeakMemory() as memory:
        loss = task.loss(model, batch)
        loss.backward()
        if parameters:
            torch.optim.AdamW(parameters, lr=job.lr).step()
    costs.peak_mb = memory.peak / 1e6


def _let_gradients_through(model: nn.Module) -> None:
    """The first layer's output requires a gradient, so that the backward pass of a frozen model has its whole way."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and not output.requires_grad:
            output.requires_grad_(True)

    first = next(m for m in model.modules() if not list(m.children()) and list(m.parameters(recurse=False)))
    first.register_forward_hook(hook)
