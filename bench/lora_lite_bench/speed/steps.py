"""A stack of transformer blocks whose every linear layer is adapted: training steps, decoding, attaching, files."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_lite_core as ll

from ..machine.costs import PeakMemory
from ..machine.timing import Action, Sample, interleave
from .contestants import FROZEN, Build, Case, Settings, attempted, builders, calibration, old_names, theirs

DECODED = 3  # tokens in one timing
KINDS = ("step", "token", "attach", "save", "load")


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
    )
    model: Any = LlamaModel(config)
    return model.to(**settings.place).requires_grad_(False)


class Contestant:
    """One adapted (or frozen) model with an optimizer of its trainable parameters, if it has any."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        from transformers import DynamicCache

        self.model = model
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.trainable = sum(p.numel() for p in parameters)
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4) if parameters else None
        make = torch.Generator().manual_seed(2)
        shape = (settings.batch, settings.length, settings.hidden)
        # The gradient goes through the whole stack for all contestants, the frozen model too.
        self.x = torch.randn(shape, generator=make).to(**settings.place).requires_grad_()
        self.prompt = self.x.detach()[:1]
        self.one = torch.randn(1, 1, settings.hidden, generator=make).to(**settings.place)
        self.cache = DynamicCache()

    def backward(self) -> None:
        self.model(inputs_embeds=self.x, use_cache=False).last_hidden_state.square().mean().backward()
        self.x.grad = None

    def step(self) -> None:
        """Forward, backward and an AdamW step."""
        self.model.train()
        self.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    @torch.no_grad()
    def decoding(self) -> Action:
        """The next tokens after the prompt, with its keys and values kept: what is timed. The prompt is not."""
        self.model.eval()
        if not self.cache.get_seq_length():
            self.model(inputs_embeds=self.prompt, past_key_values=self.cache, use_cache=True)
        if added := self.cache.get_seq_length() - self.prompt.shape[1]:
            self.cache.crop(-added)
        return self._decode

    @torch.no_grad()
    def _decode(self) -> None:
        for _ in range(DECODED):
            self.model(inputs_embeds=self.one, past_key_values=self.cache, use_cache=True)

    def peak_bytes(self) -> int:
        """Of forward and backward, beyond what is there before."""
        self.model.train()
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


@dataclass
class Measured:
    """Samples by contestant (FROZEN, "<label>", "<label> in peft" …) of each kind, and peak bytes."""

    cases: list[Case]
    samples: dict[str, dict[str, list[Sample]]] = field(default_factory=dict)  # of KINDS
    peak: dict[str, int] = field(default_factory=dict)
    trainable: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # what did not run, and why


def measure(rows: list[Case], settings: Settings, advance: Callable[[str], object]) -> Measured:
    """Everything of the table; `advance` is called with the kind of measurement after each timing."""
    base = new_model(settings)
    build = builders(rows, settings, base, calibration(settings, settings.hidden, "inputs_embeds"))
    contestants = {name: Contestant(make(copy.deepcopy(base)), settings) for name, make in build.items()}
    result = Measured(rows, trainable={name: c.trainable for name, c in contestants.items()})
    result.peak = attempted({name: c.peak_bytes for name, c in contestants.items()}, result.failed)
    contestants = {name: contestant for name, contestant in contestants.items() if name in result.peak}
    result.cases = rows = [case for case in rows if case.label in contestants]
    with tempfile.TemporaryDirectory() as place:
        saving, loading = files(rows, base, contestants, Path(place))
        few = max(3, settings.rounds // 2)
        attach = {name: attaching(base, build[name]) for name in contestants if is_plain(name, rows)}
        kinds: dict[str, tuple[int, dict[str, Callable[[], Action]]]] = {
            "step": (settings.rounds, {name: lambda c=c: c.step for name, c in contestants.items()}),
            "token": (2 * settings.rounds, {name: lambda c=c: c.decoding() for name, c in contestants.items()}),
            "attach": (few, attach),
            "save": (few, saving),
            "load": (few, loading),
        }
        for kind, (rounds, prepare) in kinds.items():
            result.samples[kind] = interleave(prepare, rounds, settings.device, lambda kind=kind: advance(kind))
    return result


def is_plain(name: str, rows: list[Case]) -> bool:
    """Whether attaching needs no data, whose pass through the model is timed apart."""
    data = {case.label for case in rows if case.variant == "eva"}
    return name != FROZEN and not any(name == label or name.startswith(f"{label} in ") for label in data)


def attaching(base: nn.Module, make: Build) -> Callable[[], Action]:
    def fresh() -> Action:
        model = copy.deepcopy(base)
        return lambda: make(model)

    return fresh


Prepared = dict[str, Callable[[], Action]]


def files(
    rows: list[Case], base: nn.Module, contestants: dict[str, Contestant], place: Path
) -> tuple[Prepared, Prepared]:
    """Saving each adapter, and loading it onto a fresh model: ours in one file, peft's in its folder."""
    saving: Prepared = {}
    loading: Prepared = {}
    for number, case in enumerate(rows):
        file = place / f"{number}.safetensors"
        model = contestants[case.label].model
        saving[case.label] = lambda model=model, file=file: lambda: ll.save(model, file)
        loading[case.label] = lambda file=file: _onto(base, lambda fresh: ll.load(fresh, file))
        ll.save(model, file)
        if (twin := theirs(case.label, "peft")) in contestants:
            folder, peft_model = place / str(number), contestants[twin].model
            saving[twin] = lambda model=peft_model, folder=folder: lambda: _save_theirs(model, folder)
            loading[twin] = lambda folder=folder: _onto(base, lambda fresh: _load_theirs(fresh, folder))
            _save_theirs(peft_model, folder)
    return saving, loading


def _onto(base: nn.Module, load: Callable[[nn.Module], object]) -> Action:
    model = copy.deepcopy(base)
    return lambda: load(model)


def _save_theirs(model: Any, folder: Path) -> None:
    model.save_pretrained(str(folder))


def _load_theirs(model: nn.Module, folder: Path) -> None:
    import peft

    with old_names():
        peft.PeftModel.from_pretrained(model, str(folder))  # type: ignore[arg-type]
