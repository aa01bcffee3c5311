"""Steps, single tokens and attaching, timed side by side: each variant, its twin in peft, and the frozen model.

All contestants are built once, in one process; then every round runs each of them once, in a new random order, so that
whatever slows the machine for a while slows all alike. Ratios are medians of ratios within rounds.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import lora_lite_core as ll

from ..machine.costs import PeakMemory
from .peers import peft_config

WARM_UP = 2  # rounds that do not count
TOKENS_AT_ONCE = 3  # single-token passes in one timing


@dataclass(frozen=True)
class Settings:
    """Sizes of the measurement. The model is a Llama without its head: `layers` blocks of seven linear layers."""

    hidden: int = 512
    rank: int = 32
    layers: int = 2
    batch: int = 4
    length: int = 128
    rounds: int = 15
    device: str = "cpu"
    dtype: str = "float32"


@dataclass(frozen=True)
class Case:
    """One row: a variant with these fields, held against the row called `reference` beside peft's twin."""

    label: str
    variant: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    reference: str = "lora"

    def config(self, settings: Settings) -> ll.AdapterConfig:
        Config = ll.get_variant(self.variant).Config
        rank: dict[str, Any] = {"r": settings.rank} if issubclass(Config, ll.RankConfig) else {}
        return Config(**{**rank, **self.fields})


def cases(variants: list[str], settings: Settings) -> list[Case]:
    """The rows for these variants: LoRA always, as the reference; DeLoRA in both its forms; AntiPaSTO at half the
    model's width, its own default being wide too, against LoRA of that rank."""
    wide = {"r": max(4, settings.hidden // 2)}
    rows = [Case("lora", "lora")]
    for name in variants:
        if name == "delora":
            rows += [Case("delora", name), Case("delora, zero B", name, {"frozen_copy": False})]
        elif name == "antipasto":
            label = f"lora r={wide['r']}"
            rows += [Case(label, "lora", wide), Case(f"antipasto r={wide['r']}", name, wide, label)]
        elif name != "lora":
            rows.append(Case(name, name))
    return rows


def new_model(settings: Settings) -> nn.Module:
    """A Llama without its head, random weights, frozen."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=settings.hidden,
        intermediate_size=3 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=max(1, settings.hidden // 64),
        use_cache=False,
    )
    model: Any = LlamaModel(config)
    return model.to(settings.device, getattr(torch, settings.dtype)).requires_grad_(False)


def linear_names(model: nn.Module) -> list[str]:
    """The last parts of the linear layers' names."""
    return sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})


def _calibration(settings: Settings) -> list[dict[str, Tensor]]:
    """Enough tokens for any rank, of random embeddings."""
    shape = (settings.batch, max(settings.length, settings.hidden), settings.hidden)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return [{"inputs_embeds": x.to(settings.device, getattr(torch, settings.dtype))}]


def attach_ours(model: nn.Module, cfg: ll.AdapterConfig, calibration: Any) -> nn.Module:
    try:
        ll.attach(model, cfg)
    except ll.CalibrationError:
        ll.attach(model, cfg, calibration_data=calibration)
    return model


def attach_theirs(model: nn.Module, config: Any) -> nn.Module:
    import peft

    with warnings.catch_warnings():  # it asks transformers for things by old names
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(model, config)  # type: ignore[arg-type]


class Contestant:
    """One adapted (or frozen) model with an optimizer of its trainable parameters, if it has any."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model = model
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.trainable = sum(p.numel() for p in parameters)
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4) if parameters else None
        make = torch.Generator().manual_seed(2)
        shape = (settings.batch, settings.length, settings.hidden)
        place: dict[str, Any] = {"device": settings.device, "dtype": getattr(torch, settings.dtype)}
        # The gradient goes through the whole stack for all contestants, the frozen model too.
        self.x = torch.randn(shape, generator=make).to(**place).requires_grad_()
        self.token = torch.randn(1, 1, settings.hidden, generator=make).to(**place)

    def backward(self) -> None:
        self.model(inputs_embeds=self.x).last_hidden_state.square().mean().backward()
        self.x.grad = None

    def step(self) -> None:
        """Forward, backward and an AdamW step."""
        self.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    @torch.no_grad()
    def tokens(self) -> None:
        for _ in range(TOKENS_AT_ONCE):
            self.model(inputs_embeds=self.token)

    def peak_bytes(self) -> int:
        """Of forward and backward, beyond what is there before."""
        try:
            if self.x.is_cuda:
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                self.backward()
                return torch.cuda.max_memory_allocated() - before
            with PeakMemory() as memory:
                self.backward()
            return memory.peak
        finally:
            self.model.zero_grad()


Sample = tuple[float, float]  # seconds: by the clock (or by CUDA events), of the processor


def timed(action: Callable[[], object], device: str) -> Sample:
    if torch.device(device).type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        cpu = time.process_time()
        start.record()
        action()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3, time.process_time() - cpu
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - cpu


def interleave(
    prepare: Mapping[str, Callable[[], Callable[[], object]]],
    rounds: int,
    device: str,
    advance: Callable[[], object] = lambda: None,
    warm_up: int = WARM_UP,
) -> dict[str, list[Sample]]:
    """Each round calls every `prepare`, untimed, and times what it gives, in random order."""
    rng = random.Random(0)
    order = list(prepare)
    samples: dict[str, list[Sample]] = {name: [] for name in order}
    for number in range(rounds + warm_up):
        rng.shuffle(order)
        for name in order:
            sample = timed(prepare[name](), device)
            if number >= warm_up:
                samples[name].append(sample)
            advance()
    return samples


def ratio(first: list[Sample], second: list[Sample], which: int) -> float:
    """Median over the rounds of first / second; which: 0 clock, 1 processor."""
    return statistics.median(a[which] / b[which] for a, b in zip(first, second, strict=True))


def milliseconds(samples: list[Sample], which: int) -> float:
    return 1e3 * statistics.median(sample[which] for sample in samples)


@dataclass
class Measured:
    """Samples by contestant ("frozen", "<label>", "<label> in peft") of each kind, and peak bytes."""

    cases: list[Case]
    samples: dict[str, dict[str, list[Sample]]] = field(default_factory=dict)  # "step", "token", "attach"
    peak: dict[str, int] = field(default_factory=dict)
    trainable: dict[str, int] = field(default_factory=dict)


def theirs(label: str) -> str:
    return f"{label} in peft"


def measure(rows: list[Case], settings: Settings, advance: Callable[[str], object]) -> Measured:
    """Everything of the table; `advance` is called with the kind of measurement after each timing."""
    base = new_model(settings)
    names, calibration = linear_names(base), _calibration(settings)
    build: dict[str, Callable[[nn.Module], nn.Module]] = {"frozen": lambda model: model}
    for case in rows:
        cfg = case.config(settings)
        build[case.label] = lambda model, cfg=cfg: attach_ours(model, cfg, calibration)
        if (config := peft_config(cfg, names)) is not None:
            build[theirs(case.label)] = lambda model, config=config: attach_theirs(model, copy.deepcopy(config))
    contestants = {name: Contestant(make(copy.deepcopy(base)), settings) for name, make in build.items()}
    result = Measured(rows, trainable={name: c.trainable for name, c in contestants.items()})
    for name, contestant in contestants.items():
        result.peak[name] = contestant.peak_bytes()

    def attaching(name: str) -> Callable[[], object]:
        model = copy.deepcopy(base)
        return lambda: build[name](model)

    kinds: dict[str, tuple[int, dict[str, Callable[[], Callable[[], object]]]]] = {
        "step": (settings.rounds, {name: lambda c=c: c.step for name, c in contestants.items()}),
        "token": (2 * settings.rounds, {name: lambda c=c: c.tokens for name, c in contestants.items()}),
        # EVA's start needs data and is measured apart.
        "attach": (
            max(3, settings.rounds // 2),
            {name: lambda name=name: attaching(name) for name in build if name != "frozen" and "eva" not in name},
        ),
    }
    for kind, (rounds, prepare) in kinds.items():
        result.samples[kind] = interleave(prepare, rounds, settings.device, lambda kind=kind: advance(kind))
    return result
