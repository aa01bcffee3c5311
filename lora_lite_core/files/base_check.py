"""Is this the base model that an adapter was made on? Fingerprints are taken at attach and compared at load."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from ..attached.targeting import Found
from ..attached.tensors import take_fingerprint
from ..contract.errors import BaseMismatch
from ..contract.text import count
from ..contract.variant import Variant
from ..layers.kinds import storage_of
from .format import AdapterFile

Reaction = Literal["error", "warn", "ignore"]

# How far two sketches of one weight may lie apart, relative to the weight's RMS. Measured over 300 layers by
# `uv run python -m tests.measure_sketch`: rounding to bfloat16 moves a sketch by at most 0.0025 and to float16 by
# 0.0003, noise of 1 % of the RMS by at least 0.0056, another seed, a permutation or a sign flip by at least 0.65.
SAME_STORAGE = 0.004
ACROSS_STORAGES = {"bnb-int8": 0.03, "bnb-nf4": 0.3, "bnb-fp4": 0.3}
ACROSS_UNKNOWN = 0.3


def check_base(file: AdapterFile, variant: Variant, found: Iterable[Found], reaction: Reaction) -> None:
    """Compare the file's fingerprints with this model's."""
    far: list[tuple[float, float, str]] = []
    across: set[tuple[str, str]] = set()
    for target in found:
        saved = file.targets[target.name]
        now = (
            take_fingerprint(variant, target.layer, target.cfg)
            if saved["fingerprint"] and reaction != "ignore"
            else None
        )
        if now is None:
            continue
        storages = saved["storage"], storage_of(target.layer)
        distance = sketch_distance(torch.tensor(saved["fingerprint"]), torch.tensor(now))
        if not distance <= (allowed := sketch_tolerance(*storages)):
            far.append((distance, allowed, target.name))
        elif storages[0] != storages[1]:
            across.add(storages)
    if far:
        distance, allowed, name = max(far)
        message = (
            f"{file.path} was made on another base model: {name} differs by {distance:.2g} of its RMS "
            f"(allowed {allowed}), {len(far)} of {count(len(file.targets), 'layer')} in all\n"
            "  load it on the model it was trained on; on_base_mismatch='warn' loads it all the same"
        )
        if reaction == "error":
            raise BaseMismatch(message)
        warnings.warn(message, stacklevel=3)
    for before, after in sorted(across):
        warnings.warn(
            f"{file.path} was trained on {before} weights and is opened on {after} ones: "
            "another model would be noticed, a fine-tune of the same one would not",
            stacklevel=3,
        )


def sketch_distance(saved: Tensor, found: Tensor) -> float:
    """RMS difference of two fingerprints over the scale in their last element; inf when they do not compare."""
    if saved.shape != found.shape:
        return math.inf
    scale = max(float(saved[-1].abs()), float(found[-1].abs()), 1e-30)
    return float((saved - found).square().mean().sqrt()) / scale


def sketch_tolerance(saved: str, found: str) -> float:
    """The largest distance two storages of one weight may show."""
    if saved == found:
        return SAME_STORAGE
    return max(
        ACROSS_STORAGES.get(kind, SAME_STORAGE if kind == "dense" else ACROSS_UNKNOWN) for kind in (saved, found)
    )
