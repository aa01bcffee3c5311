"""How costs grow: with the number of layers, with the rank, with the number of adapters on one model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import lora_lite_core as ll

from ..machine.timing import Sample, interleave
from .contestants import (
    FROZEN,
    Build,
    Case,
    Settings,
    attach_ours,
    attach_theirs,
    attempted,
    builders,
    calibration,
    linear_names,
    peft_config,
    theirs,
)
from .layers import one_pass
from .steps import attaching

NARROW = 64  # width of the layers that are many: what is seen is the cost of a layer, not of its arithmetic
WIDE = 1024  # width of the four layers whose rank grows


@dataclass(frozen=True)
class Sizes:
    """What grows, and how far."""

    layers: tuple[int, ...] = (10, 100, 1000)
    ranks: tuple[int, ...] = (8, 32, 128, 512)
    adapters: tuple[int, ...] = (1, 10, 100)


@dataclass
class GrowthRow:
    """Samples by kind ("attach", "token", "step") and contestant; `label` says what has grown, to what."""

    label: str
    case: Case
    samples: dict[str, dict[str, list[Sample]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # what did not run, and why


class Stack(nn.Module):
    """A chain of `layers` linear layers of one width; x (rows, width)."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def growth(rows: list[Case], settings: Settings, sizes: Sizes, advance: Callable[[], object]) -> list[GrowthRow]:
    """For each row: more layers, then a higher rank where it has one, then more adapters of which one is active."""
    torch.manual_seed(0)
    few = settings.with_(rounds=max(1, settings.rounds // 3))
    found: list[GrowthRow] = []
    for case in rows:
        for layers in sizes.layers:
            found.append(_grown(f"{layers:,} layers", case, few, Stack(layers, NARROW), advance))
        if issubclass(ll.get_variant(case.variant).Config, ll.RankConfig):
            for rank in sizes.ranks:
                ranked = Case(case.label, case.variant, {**case.fields, "r": rank}, case.reference)
                found.append(_grown(f"rank {rank}", ranked, few, Stack(4, WIDE), advance))
        for adapters in sizes.adapters:
            found.append(_crowded(adapters, case, few, advance))
    return found


def _grown(label: str, case: Case, settings: Settings, base: Stack, advance: Callable[[], object]) -> GrowthRow:
    base.to(**settings.place).requires_grad_(False)
    width = base.layers[0].in_features
    build = builders([case], settings, base, calibration(settings, width, "x"))
    row = GrowthRow(label, case)
    attach = {name: attaching(base, make) for name, make in build.items() if name != FROZEN}
    row.samples["attach"] = interleave(attach, settings.rounds, settings.device, advance, warm_up=1)
    models = {name: make(copy.deepcopy(base)) for name, make in build.items()}
    _passes(row, models, settings, width, advance)
    return row


def _crowded(adapters: int, case: Case, settings: Settings, advance: Callable[[], object]) -> GrowthRow:
    """`attach` is attaching one more beside `adapters - 1` others; the passes are with one of them active."""
    base = Stack(10, NARROW).to(**settings.place).requires_grad_(False)
    cfg, data = case.config(settings), calibration(settings, NARROW, "x")
    label = f"{adapters} adapter{'s' * (adapters > 1)} on 10 layers"
    row, others = GrowthRow(label, case), [f"a{number}" for number in range(adapters - 1)]
    crowds: dict[str, tuple[nn.Module, Build]] = {}
    ours = copy.deepcopy(base)
    for name in others:
        attach_ours(ours, cfg, data, name)
    crowds[case.label] = (ours, lambda model: attach_ours(model, cfg, data, "last"))
    config = peft_config(cfg, base, linear_names(base), data)
    if config is not None:
        crowds[theirs(case.label, "peft")] = (_peft_crowd(base, config, others), lambda m: _one_more(m, config))
    attach = {name: attaching(crowd, make) for name, (crowd, make) in crowds.items()}
    row.samples["attach"] = interleave(attach, settings.rounds, settings.device, advance, warm_up=1)
    models = {FROZEN: copy.deepcopy(base), **{name: make(crowd) for name, (crowd, make) in crowds.items()}}
    ll.activate(models[case.label], "last")
    _passes(row, models, settings, NARROW, advance)
    return row


def _peft_crowd(base: nn.Module, config: Any, names: list[str]) -> nn.Module:
    import peft

    if not names:
        return copy.deepcopy(base)
    model = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config), adapter_name=names[0])  # type: ignore[arg-type]
    for name in names[1:]:
        model.add_adapter(name, copy.deepcopy(config))
    return model


def _one_more(model: Any, config: Any) -> nn.Module:
    if not hasattr(model, "peft_config"):
        return attach_theirs(model, config)
    model.add_adapter("last", copy.deepcopy(config))
    model.set_adapter("last")
    return model


def _passes(
    row: GrowthRow, models: dict[str, nn.Module], settings: Settings, width: int, advance: Callable[[], object]
) -> None:
    draw = torch.Generator().manual_seed(2)
    one = torch.randn(1, width, generator=draw).to(**settings.place)
    many = torch.randn(settings.batch * settings.length, width, generator=draw).to(**settings.place)
    for kind, x, training in (("token", one, False), ("step", many, True)):
        passes = {name: one_pass(model, x, training) for name, model in models.items()}
        running = attempted(passes, row.failed)
        prepare = {name: lambda action=passes[name]: action for name in running}
        row.samples[kind] = interleave(prepare, 2 * settings.rounds, settings.device, advance)
