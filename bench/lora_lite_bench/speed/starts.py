"""How long a start from data or from the weight takes: EVA against peft's, singular triplets against a full SVD."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lora_lite_core as ll

from ..machine.costs import PeakMemory
from ..machine.timing import interleave, milliseconds, ratio


@dataclass(frozen=True)
class InitSettings:
    """EVA: `tokens` through `layers` linear layers of this width. PiSSA: one weight, width × three times the width."""

    width: int = 1024
    layers: int = 12
    rank: int = 32
    tokens: int = 20_480
    rounds: int = 2


@dataclass(frozen=True)
class InitRow:
    """Milliseconds of processor time; errors are largest principal angles (radians) to the float64 subspace."""

    label: str
    against: str
    ours_ms: float
    theirs_ms: float
    ratio: float
    our_error: float
    their_error: float
    beyond: float | None = None  # ratio of what is left without the model's own forward passes
    memory: str = ""


class Chain(nn.Module):
    """Linear layers in a residual chain, so that each receives an input of its own; x (batch, length, width)."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 0.1 * layer(x)
        return x


def activations(settings: InitSettings) -> list[dict[str, Tensor]]:
    """Batches of 1024 tokens, four sequences each, with a mean and a covariance that decays as i^-1.5."""
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(settings.width, settings.width, generator=draw)).Q
    spread = torch.arange(1, settings.width + 1).float() ** -0.75
    mean = torch.randn(settings.width, generator=draw) / settings.width**0.5
    return [
        {"x": (torch.randn(4, 256, settings.width, generator=draw) * spread) @ basis + mean}
        for _ in range(max(1, settings.tokens // 1024))
    ]


def principal_angle(rows: Tensor, truth: Tensor) -> float:
    """Largest angle between the span of `rows` (r, d) and that of orthonormal `truth` (r, d)."""
    Q = torch.linalg.qr(rows.double().T).Q
    rest = Q - truth.T @ (truth @ Q)
    return float(torch.linalg.matrix_norm(rest, 2).clamp_max(1).arcsin())


@torch.no_grad()
def true_directions(model: Chain, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """Per layer all eigenvectors (d, d) of its input's covariance, as rows, strongest first, in float64."""
    seen: list[list[Tensor]] = [[] for _ in model.layers]
    for batch in batches:
        x = batch["x"]
        for layer, inputs in zip(model.layers, seen, strict=True):
            inputs.append(x.flatten(0, -2))
            x = x + 0.1 * layer(x)
    found = []
    for inputs in seen:
        rows = torch.cat(inputs).double()
        rows -= rows.mean(0)
        found.append(torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1).T)
    return found


TAUS = (0.99, 0.999)  # when peft calls a direction converged: its default, and stricter to come nearer to ours


def eva(settings: InitSettings, advance: Callable[[], object]) -> list[InitRow]:
    """Attaching EVA, with ranks moved between layers (rho = 2, peft's default), to the same data."""
    torch.manual_seed(0)
    base, batches = Chain(settings.layers, settings.width).requires_grad_(False), activations(settings)
    ready: dict[str, nn.Module] = {}
    passes: dict[str, int] = {}

    def prepare(who: str, start: Callable[[Chain], nn.Module]) -> Callable[[], Callable[[], None]]:
        def fresh() -> Callable[[], None]:
            model, passes[who] = copy.deepcopy(base), 0

            def count(*_: object) -> None:
                passes[who] += 1

            model.register_forward_pre_hook(count)
            return lambda: ready.update({who: start(model)})

        return fresh

    contestants = {"ours": prepare("ours", lambda model: _start_ours(model, settings, batches))}
    for tau in TAUS:
        start = functools.partial(_start_theirs, settings=settings, batches=batches, tau=tau)
        contestants[f"peft, tau={tau}"] = prepare(f"peft, tau={tau}", start)
    contestants["pass"] = lambda: lambda: base(**batches[0])
    samples = interleave(contestants, settings.rounds, "cpu", advance, warm_up=0)
    ms = {who: milliseconds(samples[who], 1) for who in samples}
    own = {who: ms[who] - passes[who] * ms["pass"] for who in passes}
    truth = true_directions(base, batches)
    errors = {who: _largest_error(model, truth) for who, model in ready.items()}
    peaks = [_peak_mb(base, settings, part) for part in (batches[: (len(batches) + 1) // 2], batches)]
    return [
        InitRow(
            f"EVA, {1024 * len(batches):,} tokens, {settings.layers} layers of {settings.width}, r={settings.rank}",
            who,
            ms["ours"],
            ms[who],
            ratio(samples["ours"], samples[who], 1),
            errors["ours"],
            errors[who],
            own["ours"] / own[who],
            f"{peaks[1]:.0f} MB; {peaks[0]:.0f} MB for half the tokens",
        )
        for who in contestants
        if who.startswith("peft")
    ]


def _start_ours(model: Chain, settings: InitSettings, batches: list[dict[str, Tensor]], rho: float = 2.0) -> nn.Module:
    ll.attach(model, ll.LoraLiteConfig(variant="eva", r=settings.rank, rho=rho), calibration_data=batches)
    return model


def _start_theirs(model: Chain, settings: InitSettings, batches: list[dict[str, Tensor]], tau: float) -> nn.Module:
    import peft

    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank,
        target_modules=[f"layers.{i}" for i in range(settings.layers)],
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=2.0, tau=tau, use_label_mask=False),
    )
    adapted = peft.get_peft_model(model, config, low_cpu_mem_usage=True)  # type: ignore[arg-type]
    peft.initialize_lora_eva_weights(
        adapted, batches, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False
    )
    return adapted


def _largest_error(model: nn.Module, truth: list[Tensor]) -> float:
    """Over the layers, which have as many directions as their A has rows; a layer without rank has no A."""
    found = {name: p.detach() for name, p in model.named_parameters() if "lora_A" in name}
    return max(
        principal_angle(A, directions[: len(A)])
        for number, directions in enumerate(truth)
        for name, A in found.items()
        if f"layers.{number}." in name
    )


def _peak_mb(base: Chain, settings: InitSettings, batches: list[dict[str, Tensor]]) -> float:
    model = copy.deepcopy(base)
    with PeakMemory() as memory:
        _start_ours(model, settings, batches)
    return memory.peak / 1e6


def pissa(settings: InitSettings, advance: Callable[[], object]) -> list[InitRow]:
    """The singular triplets that PiSSA starts from, of a weight with a slowly decaying spectrum."""
    shape, r = (settings.width, 3 * settings.width), settings.rank
    draw = torch.Generator().manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(shape, generator=draw, dtype=torch.float64), full_matrices=False)
    S = torch.arange(1, settings.width + 1, dtype=torch.float64) ** -0.3
    weight = ((U * S) @ Vh).float()
    directions = torch.linalg.svd(weight.double(), full_matrices=False).Vh[:r]
    samples = interleave(
        {
            "ours": lambda: lambda: ll.truncated_svd(weight, r, torch.Generator()),
            "theirs": lambda: lambda: torch.linalg.svd(weight, full_matrices=False),
        },
        5 * settings.rounds,
        "cpu",
        advance,
        warm_up=1,
    )
    row = InitRow(
        f"singular triplets of {shape[0]} × {shape[1]}, r={r} (PiSSA, LoRA-XS, SSVD)",
        "torch.linalg.svd",
        milliseconds(samples["ours"], 1),
        milliseconds(samples["theirs"], 1),
        ratio(samples["ours"], samples["theirs"], 1),
        principal_angle(ll.truncated_svd(weight, r, torch.Generator())[2], directions),
        principal_angle(torch.linalg.svd(weight, full_matrices=False).Vh[:r], directions),
    )
    return [row]
