"""One linear layer, small or of a language model's size: one token, or a training pass of many, beside the floor that
the machine's own ceilings put under it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..machine.ceilings import floor_seconds
from ..machine.timing import Action, Sample, interleave
from .contestants import Case, Settings, attempted, builders, calibration


@dataclass(frozen=True)
class Cell:
    """One table: a square layer of this width, in this dtype, eager or compiled by torch.compile."""

    width: int
    dtype: str
    compiled: bool

    @property
    def title(self) -> str:
        return f"{self.width} × {self.width}, {self.dtype}, {'compiled' if self.compiled else 'eager'}"


@dataclass
class CellMeasured:
    """Samples and floors (seconds) by number of tokens and contestant; what did not run or compile, and why.

    One token is a forward pass without gradients; of more, forward and backward, the input's gradient too.
    """

    cell: Cell
    cases: list[Case]
    samples: dict[int, dict[str, list[Sample]]] = field(default_factory=dict)
    floors: dict[int, dict[str, float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


class OneLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


def measure_cell(
    cell: Cell, rows: list[Case], tokens: list[int], settings: Settings, advance: Callable[[str], object]
) -> CellMeasured:
    torch.manual_seed(0)
    settings = settings.with_(dtype=cell.dtype)
    base = OneLayer(cell.width).to(**settings.place).requires_grad_(False)
    build = builders(rows, settings, base, calibration(settings, cell.width, "x"))
    models = {name: make(copy.deepcopy(base)) for name, make in build.items()}
    result = CellMeasured(cell, rows)
    for number in tokens:
        for model in models.values():
            model.train(number > 1)
        x = torch.randn(number, cell.width, generator=torch.Generator().manual_seed(2)).to(**settings.place)
        passes = {name: one_pass(model, x, number > 1) for name, model in models.items()}
        floors = {name: partial(floor_of, models[name], x, number, passes[name], settings) for name in passes}
        result.floors[number] = attempted(floors, result.failed)
        if cell.compiled:
            running = {name: model for name, model in models.items() if name not in result.failed}
            passes = _compiled(running, x, number, result.failed)
        prepare = {name: lambda action=action: action for name, action in passes.items() if name not in result.failed}
        rounds = settings.rounds if number * cell.width**2 < 2**31 else max(1, settings.rounds // 5)
        result.samples[number] = interleave(
            prepare, rounds, settings.device, lambda: advance(cell.title), warm_up=2 if rounds > 3 else 1
        )
    return result


def one_pass(model: Callable[[Tensor], Tensor], x: Tensor, training: bool) -> Action:
    """Forward and backward, into the adapter and the input; or forward alone, without gradients."""
    if not training:

        def forward() -> None:
            with torch.no_grad():
                model(x)

        return forward
    x = x.clone().requires_grad_()

    def both() -> None:
        model(x).square().mean().backward()
        x.grad = None

    return both


def floor_of(model: nn.Module, x: Tensor, tokens: int, action: Action, settings: Settings) -> float:
    """Seconds that the matrix products which a pass does, or the bytes that it must move, take at the machine's best.

    Bytes: the weight, the adapter, the input and the output once; in a training pass the weight and the adapter again,
    the adapter's gradients, and the gradients of output and input.
    """
    with FlopCounterMode(display=False) as counter:
        action()
    model.zero_grad()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    ends = 2 * x.numel() * x.element_size()
    moved = weights + ends if tokens == 1 else 2 * weights + trained + 2 * ends
    return floor_seconds(settings.device, x.dtype, counter.get_total_flops(), moved)


def _compiled(models: dict[str, nn.Module], x: Tensor, tokens: int, failed: dict[str, str]) -> dict[str, Action]:
    passes = {}
    for name, model in models.items():
        torch._dynamo.reset()  # one contestant's graphs do not count toward another's limit
        action = one_pass(torch.compile(model, dynamic=False), x, tokens > 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attempted({name: action}, failed)
        passes[name] = action
        model.zero_grad()
    return passes
