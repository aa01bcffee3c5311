"""A sketch of a layer's weight, which recognises it again."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .kinds.layer_kinds import layer_device, sizes_of
from .weight_reading import base_forward, plain_weight, probe, within

SKETCH_SIZE = 16  # projections of a sketch


def sketch(layer: nn.Module) -> Tensor:
    """Sixteen fixed cosine projections uₖᵀ W vₖ (‖uₖ‖ = ‖vₖ‖ = 1) and the RMS of W as probed by them: (17,) float32.

    It recognises a weight: it survives rounding to bfloat16 and float16, and tells other weights, permutations, sign
    flips and a 1 % fine-tune apart. Of quantised and other special layers a twin is run on the sixteen rows.
    """
    d_in, d_out = sizes_of(layer)
    device = layer_device(layer)
    rows = _cosines(SKETCH_SIZE, d_in, (math.sqrt(5) - 1) / 2).to(device)
    columns = _cosines(SKETCH_SIZE, d_out, math.sqrt(2) - 1).to(device)
    if (weight := plain_weight(layer)) is not None:
        with within(torch.no_grad(), torch.autocast(device.type, enabled=False)):
            images = rows @ weight.T.to(rows.dtype)
    else:
        with probe(layer, bias=False) as (twin, zero):
            images = (base_forward(twin, rows.to(zero.dtype)) - base_forward(twin, zero)).to(rows.dtype)
    projections = (images * columns).sum(-1)
    return torch.cat([projections, images.square().mean().sqrt().reshape(1)]).float()


def _cosines(count: int, size: int, ratio: float) -> Tensor:
    """(count, size) unit rows cos(ωₖ(i + ½)), the ωₖ spread over (0, π) by multiples of an irrational ratio."""
    frequencies = math.pi * torch.remainder(ratio * torch.arange(1, count + 1, dtype=torch.float64, device="cpu"), 1.0)
    rows = torch.cos(frequencies[:, None] * (torch.arange(size, dtype=torch.float64, device="cpu") + 0.5))
    rows = rows / rows.norm(dim=-1, keepdim=True)
    return rows.float()


# How far two sketches of one weight may lie apart, relative to the weight's RMS. Measured over 300 layers by
# `uv run python -m tests.measure_sketch`: rounding to bfloat16 moves a sketch by at most 0.0025 and to float16 by
# 0.0003, noise of 1 % of the RMS by at least 0.0056, another seed, a permutation or a sign flip by at least 0.65.
SAME_STORAGE = 0.004
ACROSS_STORAGES = {"bnb-int8": 0.03, "bnb-nf4": 0.3, "bnb-fp4": 0.3}
ACROSS_UNKNOWN = 0.3


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
