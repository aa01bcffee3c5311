"""PSOFT: the principal part of the weight is rotated inside its r-dimensional subspace.

    y = W x + b + B (D R C − I) A x,   R = (I − Q)⁻¹ (I + Q),   D = diag(1 + d),   C = diag(1 + c)

A (r, d_in) are the r first right singular vectors of W, B (d_out, r) the left ones times the singular values, both
frozen (start="pissa" gives each the root of the singular values). Q (r × r, skew-symmetric: r (r−1)/2 numbers), d and c
(r) are trained from zero; D R C − I is added up from R − I, c and d, so that it is zero at step 0. The peft package's
psoft_alpha divides B and multiplies the product: nothing is left of it. Reads the base's dense weight once, at attach;
a file only fits the weights it was made on. r (r−1)/2 + 2 r parameters, r (d_in + d_out) + r² multiply-accumulates per
token and an inverse of r × r per call.

Wu, Hu, Min, Wang: Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation, 2025, arXiv:2505.11235.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lite_core import ParamSpec, RankConfig, TargetError, dense_weight, hookimpl, lowrank_delta, project, sketch
from lora_lite_core import truncated_svd as svd

from . import _peft_subspace
from ._turns import bounded, check_terms, rotation_offset

BENCH = {"lr": 2e-2}


@dataclass(frozen=True, kw_only=True)
class PSOFTConfig(RankConfig):
    """Config of PSOFT; r is the size of the subspace, at least 2 for a rotation.

    dropout          share of the adapter's input that is zero in training
    orthogonal       rotate; False trains all r² numbers in the place of a rotation
    mag_out, mag_in  scale coordinates behind the rotation (d) and before it (c)
    start            "psoft", or "pissa"
    terms            of the truncated series that OFT has, too, from 2 to 100; None turns exactly
    bound            largest ‖Q‖_F of the series; None for none
    """

    variant = "psoft"

    dropout: float = 0.0
    orthogonal: bool = True
    mag_out: bool = True
    mag_in: bool = True
    start: str = "psoft"
    terms: int | None = None
    bound: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_terms("PSOFTConfig", self.terms)
        _peft_subspace.check(self)


Config = PSOFTConfig
to_peft, from_peft = hookimpl(_peft_subspace.psoft_to_peft), hookimpl(_peft_subspace.psoft_from_peft)


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: PSOFTConfig) -> dict[str, ParamSpec]:
    if (r := cfg.r) > min(d_in, d_out):
        raise TargetError(f"PSOFTConfig(r={r}) on a layer {d_in} → {d_out}: r is at most {min(d_in, d_out)}")
    turn = ParamSpec((r * (r - 1) // 2,), doc="upper triangle of Q") if cfg.orthogonal else ParamSpec((r, r))
    frozen = {"lora_A": ParamSpec((r, d_in), trainable=False), "lora_B": ParamSpec((d_out, r), trainable=False)}
    scales = [name for name, there in (("lora_d", cfg.mag_out), ("lora_c", cfg.mag_in)) if there]
    return {**frozen, "lora_q": turn, **{name: ParamSpec((r,)) for name in scales}}


@hookimpl
def init(layer: nn.Module, params: dict[str, Tensor], cfg: PSOFTConfig, generator: torch.Generator) -> None:
    A, B = _peft_subspace.factors(svd(dense_weight(layer), cfg.r, generator), cfg.start)
    params["lora_A"].copy_(A)
    params["lora_B"].copy_(B)


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: PSOFTConfig, training: bool) -> Tensor:
    if training and cfg.dropout and x.is_floating_point():
        x = F.dropout(x, cfg.dropout)
    with torch.autocast(y.device.type, enabled=False):
        M = params["lora_q"].to(full := torch.promote_types(y.dtype, torch.float32))
        if cfg.orthogonal:
            q = M[None] if cfg.bound is None else bounded(M[None], cfg.bound)
            M = rotation_offset(q, cfg.r, cfg.terms)[0]  # R − I
        for name, axis in (("lora_c", 0), ("lora_d", 1)):
            if name in params:
                scale = params[name].to(full)
                M = torch.addcmul(M + torch.diag(scale), M, scale.unsqueeze(axis))
    return lowrank_delta(project(x, params["lora_A"]), M, params["lora_B"]).to(y.dtype).add_(y)


@hookimpl
def fingerprint(layer: nn.Module) -> Tensor:
    return sketch(layer)
