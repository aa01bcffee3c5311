"""Several adapters as a new one: a LoRA whose change is a weighted sum of theirs, or what another rule makes of it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...attached.model_checks import GATHER, check_not_sharded
from ...attached.records import check_name, check_outside, record_of, targets_of
from ...attached.targets.experts import single
from ...contract.errors import ConfigError
from ...contract.target import Target
from ...discovery.registry import get_variant
from ...weights.probing import READING
from .config_json.layout import refuse_whole_modules
from .importing import import_peft
from .serving.lora_folder import change_of, check_rank, factors, needed, rank_of, write_lora
from .serving.report import LoRAExport

COMPLETE = 1e-7  # relative error of ΔW that counts as none: what float32 keeps of it
Rule = Callable[[Sequence[Tensor], Sequence[float], float, torch.Generator], Tensor]


@torch.no_grad()
def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    *,
    name: str,
    rank: int | None = None,
    method: str = "exact",
    density: float = 0.2,
    seed: int = 0,
) -> LoRAExport:
    """Attach a LoRA called `name` that does what these adapters do together, with these weights; they stay, and are to
    be switched off: `activate(model, name)`.

    weights  {adapter: weight}, of any sign; adapters may be of different variants, ranks and layers, and not be active.
             Their own strengths count, too
    rank     of the new one; None keeps all of the sum ("exact": at most the sum of their ranks), and for the other
             methods is the largest rank among the adapters
    method   what is made of the changes ΔW of a layer, in float64:
             "exact"            Σ w ΔW
             "magnitude_prune"  of each ΔW only the share `density` of its largest entries, then the sum
             "dare"             of each only a random share, divided by `density` (Yu et al. 2024, arXiv 2311.03099)
             "ties"             pruned by size, then of each entry the mean of w ΔW over those that have the sign of
                                Σ ΔW (Yadav et al. 2023, arXiv 2306.01708)
             "dare_ties"        the same of what "dare" leaves
    seed     of the random shares

    Returns each layer's rank and the relative error that cutting it has cost; nothing stays on disk. Raises
    AdapterNameError, ConfigError, MissingPlugin where no package with the variant `lora` is installed, and MergeError
    for what is not affine in its input, or shifts a bias.
    """
    rule = _checked(weights, rank, method, density)
    get_variant("lora")  # or what is made could not be read
    check_name(model, name)
    check_not_sharded(model, GATHER)
    check_outside(model, *READING)
    for one in weights:
        refuse_whole_modules(record_of(model, one))
    targets, found = _changes(model, weights)
    generator = torch.Generator().manual_seed(seed)
    parts = {
        path: factors(rule([delta for _, delta in each], [w for w, _ in each], density, generator), COMPLETE)
        for path, each in found.items()
    }
    whole = max(1, *(needed(S, COMPLETE) for _, S, _ in parts.values()))
    own = [rank_of(target) for target in targets.values()]
    size = rank or (whole if method == "exact" else min(whole, max(1, *own)))
    with tempfile.TemporaryDirectory() as folder:
        result = LoRAExport(Path(folder) / name, size)
        write_lora(model, model, targets, parts, result, tol=COMPLETE, cast=torch.float32, variant="lora")
        import_peft(model, result.directory, name=name)
    return replace(result, directory=Path())


def _changes(
    model: nn.Module, weights: Mapping[str, float]
) -> tuple[dict[str, Target], dict[str, list[tuple[float, Tensor]]]]:
    """A target for each layer that one of the adapters is on, and by layer or single expert their ΔW, each with its
    weight."""
    targets: dict[str, Target] = {}
    found: dict[str, list[tuple[float, Tensor]]] = {}
    for name, weight in weights.items():
        for path, target in targets_of(model, name).items():
            held = targets.setdefault(path, target)
            if rank_of(target) > rank_of(held):
                targets[path] = target
            for one in single(target):
                found.setdefault(one.name, []).append((weight, change_of(one, inactive=True)))
    return targets, found


def _checked(weights: Mapping[str, float], rank: int | None, method: str, density: float) -> Rule:
    if not weights or not all(isinstance(w, (int, float)) and math.isfinite(w) for w in weights.values()):
        raise ConfigError(f"weights={dict(weights)!r}: give a finite number for each adapter, as in {{'style': 0.7}}")
    if method not in RULES:
        raise ConfigError(f"method={method!r}; the methods are {', '.join(RULES)}")
    check_rank(rank)
    if not 0 < density <= 1:
        raise ConfigError(f"density={density!r}: the share of entries that is kept is above 0 and at most 1")
    return RULES[method]


def _sum(deltas: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator) -> Tensor:
    return torch.stack([w * delta for w, delta in zip(weights, deltas, strict=True)]).sum(0)


def _prune(deltas: Sequence[Tensor], density: float) -> list[Tensor]:
    kept: list[Tensor] = []
    for delta in deltas:
        largest = delta.abs().flatten().topk(max(1, int(density * delta.numel()))).indices
        mask = torch.zeros(delta.numel(), dtype=torch.bool, device=delta.device).index_fill(0, largest, True)
        kept.append(delta * mask.view_as(delta))
    return kept


def _drop(deltas: Sequence[Tensor], density: float, generator: torch.Generator) -> list[Tensor]:
    masks = [torch.rand(delta.shape, generator=generator) < density for delta in deltas]
    return [delta * mask.to(delta.device) / density for delta, mask in zip(deltas, masks, strict=True)]


def _elect(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    each = torch.stack([*deltas])
    agree = each.sign() == torch.where(each.sum(0) >= 0, 1.0, -1.0)
    scale = torch.tensor(weights, dtype=each.dtype, device=each.device).view(-1, 1, 1)
    return (scale * each * agree).sum(0) / agree.sum(0).clamp_min(1)


RULES: dict[str, Rule] = {
    "exact": _sum,
    "magnitude_prune": lambda deltas, weights, density, g: _sum(_prune(deltas, density), weights, density, g),
    "dare": lambda deltas, weights, density, g: _sum(_drop(deltas, density, g), weights, density, g),
    "ties": lambda deltas, weights, density, g: _elect(_prune(deltas, density), weights),
    "dare_ties": lambda deltas, weights, density, g: _elect(_drop(deltas, density, g), weights),
}
