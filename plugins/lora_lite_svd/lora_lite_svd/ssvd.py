"""SSVD: the top right singular directions of the weight are rotated, and their singular values shifted.

    W' = U (S + δ) R Vh   on the r largest singular triplets,   R = (I − X)⁻¹ (I + X),   X skew-symmetric, r × r
    y  = W x + b + U [ δ ⊙ h + (S + δ) ⊙ ((R − I) h) ],   h = Vh x

U (d_out, r), S (r), Vh (r, d_in) are frozen; δ (r) and the r (r−1)/2 entries of X are trained from zero, which makes
both terms of the bracket zero at step 0. The rotation is the exact Cayley transform. The authors' code differs: it
takes the first-order matrix I − 2K, which is not orthogonal, and gates a random δ, which is no identity at step 0.
Reads the base's dense weight once, at attach; a file only fits the weights it was made on. r + r (r−1)/2 parameters,
r (d_in + d_out) + r² multiply-accumulates per token.

Wang, Watanabe, Van hamme: SSVD: Structured SVD for Parameter-Efficient Fine-Tuning, 2025 (ASRU), arXiv:2509.02830.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lite_core import ParamSpec, RankConfig, hookimpl, project, remembered, sketch

from ._rotations import whole_offset
from ._triplets import copy_triplets, singular_triplets


@dataclass(frozen=True, kw_only=True)
class SSVDConfig(RankConfig):
    """Config of SSVD; r is the number of singular directions."""

    variant = "ssvd"


Config = SSVDConfig


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: SSVDConfig) -> dict[str, ParamSpec]:
    specs = {
        "lora_U": ParamSpec((d_out, cfg.r), trainable=False),
        "lora_S": ParamSpec((cfg.r,), trainable=False),
        "lora_Vh": ParamSpec((cfg.r, d_in), trainable=False),
        "lora_dS": ParamSpec((cfg.r,), doc="offsets δ of the singular values"),
    }
    if cfg.r > 1:
        specs["lora_X"] = ParamSpec((cfg.r * (cfg.r - 1) // 2,), doc="strict upper triangle of X")
    return specs


@hookimpl
def init(layer: nn.Module, params: dict[str, Tensor], cfg: SSVDConfig, name: str, generator: torch.Generator) -> None:
    copy_triplets(params, singular_triplets(layer, cfg.r, name, generator))


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: SSVDConfig) -> Tensor:
    full = torch.promote_types(y.dtype, torch.float32)
    h = project(x, params["lora_Vh"])
    S, dS = params["lora_S"].to(h.dtype), params["lora_dS"].to(h.dtype)
    change = dS * h
    if cfg.r > 1:
        with torch.autocast(x.device.type, enabled=False):
            offset = remembered(whole_offset, params["lora_X"], cfg.r, full)
        change = change + (S + dS) * F.linear(h, offset.to(h.dtype))
    return F.linear(change, params["lora_U"].to(h.dtype)).to(y.dtype).add_(y)


@hookimpl
def fingerprint(layer: nn.Module) -> Tensor:
    return sketch(layer)
