"""What is compared: variants with their configs, and the anchors that every table has beside them."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from bisect import bisect_left
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

import lora_lite_core as ll

from ..tasks import Task

FROZEN, FULL, HEAD = "(frozen)", "(full fine-tuning)", "(head only)"  # no variant's name has a bracket
ANCHORS = (FROZEN, FULL, HEAD)
REFERENCE = "lora"
MATCHED = 0.1  # numbers of parameters that differ by no more than this share count as the same


def config_for(task: Task, method: str, fields: dict[str, Any]) -> ll.AdapterConfig:
    """The variant's own defaults, under them what the task asks for, over them the user's fields."""
    return ll.LoraLiteConfig(variant=method, **{**task.config(), **fields})


def fitting(task: Task, method: str, fields: dict[str, Any], fixed: bool = False) -> dict[str, Any]:
    """The fields, with a default rank cut to the smaller side of the smallest layer when there is no room for more; not
    where it is `fixed`, because the user has given it."""
    cfg = config_for(task, method, fields)
    if not isinstance(cfg, ll.RankConfig) or fixed:
        return fields
    return fields if cfg.r <= (room := smallest_side(task, method, fields)) else {**fields, "r": room}


def known_fields(method: str) -> frozenset[str]:
    """The names of the fields of a variant's config."""
    return frozenset(field.name for field in dataclasses.fields(ll.get_variant(method).Config))


def smallest_side(task: Task, method: str, fields: dict[str, Any]) -> int:
    """Of the layers that the variant would be put on: the most that a rank can be."""
    cfg = config_for(task, method, fields)
    names = ("target_names", "exclude_names", "target_roles", "layers", "train_modules")
    return _smallest_side(task, tuple((name, getattr(cfg, name)) for name in names))


@cache
def _smallest_side(task: Task, selection: tuple[tuple[str, Any], ...]) -> int:
    model, _ = task.load()
    adapter = ll.attach(model, config_for(task, REFERENCE, {**dict(selection), "r": 1}))
    return min(min(target.d_in, target.d_out) for target in adapter.layers().values())


def parameters_of(task: Task, method: str, fields: dict[str, Any], calibration: Any = None) -> int:
    """How many parameters are trained."""
    model, _ = task.load()
    return sum(p.numel() for p in attach(model, config_for(task, method, fields), 0, calibration).parameters())


def matched_rank(task: Task, method: str, fields: dict[str, Any], wanted: int, calibration: Any = None) -> int | None:
    """The rank at which a variant trains about `wanted` parameters, by bisection among those that it takes here;
    None for a variant without a rank, and where no rank comes within MATCHED of it."""
    if not isinstance(config_for(task, method, fields), ll.RankConfig):
        return None

    def takes(rank: int) -> bool:
        try:
            config_for(task, method, {**fields, "r": rank})
        except ll.ConfigError:  # an odd one, or no multiple of a block's size
            return False
        return True

    @cache
    def count(rank: int) -> float:
        try:
            return parameters_of(task, method, {**fields, "r": rank}, calibration)
        except ll.TargetError:  # more than the layers have room for
            return math.inf

    ranks = [rank for rank in range(1, smallest_side(task, method, fields) + 1) if takes(rank)]
    place = bisect_left(ranks, wanted, key=count)
    near = ranks[max(0, place - 1) : place + 1]
    best = min(near, key=lambda rank: abs(count(rank) - wanted), default=None)
    return best if best is not None and abs(count(best) - wanted) <= MATCHED * wanted else None


def attach(model: nn.Module, cfg: ll.AdapterConfig, seed: int, calibration: Any, name: str = "default") -> ll.Adapter:
    """Attach, with calibration data only where the variant, so configured, needs it."""
    try:
        return ll.attach(model, cfg, name=name, seed=seed)
    except ll.CalibrationError:
        return ll.attach(model, cfg, name=name, seed=seed, calibration_data=calibration)


def anchor_parameters(model: nn.Module, method: str, head: str) -> dict[str, nn.Parameter]:
    """The parameters that an anchor trains, by name; all others are frozen. A head that is tied to the embeddings is
    given a weight of its own."""
    model.requires_grad_(False)
    if method == FROZEN:
        return {}
    if method == HEAD:
        layer = model.get_submodule(head)
        for name, parameter in list(layer.named_parameters()):
            owner, _, last = name.rpartition(".")
            own = nn.Parameter(parameter.detach().clone())
            setattr(layer.get_submodule(owner), last, own)
        trained = {f"{head}.{name}": parameter for name, parameter in layer.named_parameters()}
    else:
        trained = dict(model.named_parameters())
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return trained


@cache
def source_hash(*paths: Path | None) -> str:
    """Of the code that a result came from, as it was when the process first asked: other code is another result."""
    digest = hashlib.sha256()
    for path in filter(None, paths):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
