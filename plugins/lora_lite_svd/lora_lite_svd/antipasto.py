"""AntiPaSTO: singular values are shifted and singular directions rotated in small blocks.

    W' = U R_Uᵀ (S + δ) R_V Vh   on r singular triplets,   R = blockdiag((I − X)⁻¹ (I + X)),   X skew-symmetric, b × b
    y  = W x + b + U [ δ ⊙ h + (S + δ) ⊙ ((R_V − I) h) + (R_Uᵀ − I) z ],   h = Vh x,   z = (S + δ) ⊙ (R_V h)

with R_V, R_U or both left out as `rotate_basis` says. U (d_out, r), S (r), Vh (r, d_in) are frozen; δ (r) and the
angles' parameters T (r/b, b(b−1)/2) are trained from zero, which makes every term zero at step 0. X holds ½ L tanh(T /
2L) with L = 2 tan(θ/2), θ = max_rotation_angle: that bounds every entry of X, and the rotation angle itself by θ only
for b = 2; for b = 4 the worst case is 2 atan(cot(π/8) tan(θ/2)), 1.105 for θ = 0.5. Reads the base's dense weight at
attach; a file only fits the weights it was made on. r + r (b−1)/2 parameters with one rotation, r (d_in + d_out) + r b
multiply-accumulates per token.

Clark: AntiPaSTO, 2026, arXiv:2601.07473, in the form with block rotations and an untouched base weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lite_core import ParamSpec, RankConfig, Target, hookimpl, project, sketch

from ._rotations import block_offset, check_rotations, rotate
from ._triplets import copy_triplets, select_triplets, singular_triplets


@dataclass(frozen=True, kw_only=True)
class AntiPaSTOConfig(RankConfig):
    """Config of AntiPaSTO.

    r                   number of singular triplets, a multiple of block_size
    block_size          b, at least 2
    rotate_basis        "V" (input side), "U" (output side), "both" or "none"
    max_rotation_angle  θ in radians, above 0 and below π
    select              which triplets: "s" those of the largest singular values; "rms" and "mean_abs" (with calibration
                        data) those with the largest S · rms(v·x) or S · mean|v·x|
    """

    variant = "antipasto"

    r: int = 256
    block_size: int = 4
    rotate_basis: str = "V"
    max_rotation_angle: float = 0.5
    select: str = "s"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rotations(self)


Config = AntiPaSTOConfig


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: AntiPaSTOConfig) -> dict[str, ParamSpec]:
    b = cfg.block_size
    sides = {"V": "V", "U": "U", "both": "VU", "none": ""}[cfg.rotate_basis]
    return {
        "lora_U": ParamSpec((d_out, cfg.r), trainable=False),
        "lora_S": ParamSpec((cfg.r,), trainable=False),
        "lora_Vh": ParamSpec((cfg.r, d_in), trainable=False),
        "lora_dS": ParamSpec((cfg.r,), doc="offsets δ of the singular values"),
        **{f"lora_T{side}": ParamSpec((cfg.r // b, b * (b - 1) // 2), doc=f"rotation of {side}") for side in sides},
    }


@hookimpl
def init(layer: nn.Module, params: dict[str, Tensor], cfg: Any, name: str, generator: torch.Generator) -> None:
    copy_triplets(params, singular_triplets(layer, cfg.r, name, generator))


@hookimpl
def group_init(model: nn.Module, targets: tuple[Target, ...], cfg: Any, calibration_data: Any) -> None:
    select_triplets(model, targets, cfg.select, calibration_data)


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: AntiPaSTOConfig) -> Tensor:
    h = project(x, params["lora_Vh"])
    S, dS = params["lora_S"].to(h.dtype), params["lora_dS"].to(h.dtype)
    change = dS * h
    offsets = {side: block_offset(params[f"lora_T{side}"], cfg, h) for side in "VU" if f"lora_T{side}" in params}
    if "V" in offsets:
        change = change + (S + dS) * rotate(offsets["V"], h)
    if "U" in offsets:
        change = change + rotate(offsets["U"].mT, S * h + change)  # z = (S + δ) ⊙ (R_V h) = S ⊙ h + the change so far
    return F.linear(change, params["lora_U"].to(h.dtype)).to(y.dtype).add_(y)


@hookimpl
def fingerprint(layer: nn.Module) -> Tensor:
    return sketch(layer)
