"""Spectral Adapter: the top singular vectors of the weight are trained, on both sides.

    W' = (U + dU) S (V + dV)ᵀ on the r largest singular triplets
    y  = W x + b + dU (S ⊙ (h + dh)) + U (S ⊙ dh),   h = Vh x,  dh = dVᵀ x

U (d_out, r), S (r) and Vh (r, d_in) are frozen; the offsets dU and dV are trained from zero, and each term of the
change has one of them, which makes step 0 the identity. This is the additive form (the paper's other one rotates).
Unlike PiSSA's, what is added to either side is multiplied by all of S, not by its root. Reads the base's dense weight
once, at attach; a file only fits the weights it was made on. r (d_in + d_out) parameters, 2 r (d_in + d_out)
multiply-accumulates per token.

Zhang, Pilanci: Spectral Adapter: Fine-Tuning in Spectral Space, 2024 (NeurIPS), arXiv:2405.13952.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lite_core import ParamSpec, RankConfig, hookimpl, project, sketch

from ._triplets import copy_triplets, singular_triplets

BENCH = {"lr": 2e-3}


@dataclass(frozen=True, kw_only=True)
class SpectralConfig(RankConfig):
    """Config of the Spectral Adapter; r is the number of singular directions."""

    variant = "spectral"


Config = SpectralConfig


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: SpectralConfig) -> dict[str, ParamSpec]:
    return {
        "lora_U": ParamSpec((d_out, cfg.r), trainable=False),
        "lora_S": ParamSpec((cfg.r,), trainable=False),
        "lora_Vh": ParamSpec((cfg.r, d_in), trainable=False),
        "lora_dU": ParamSpec((d_out, cfg.r), doc="offset of U"),
        "lora_dV": ParamSpec((cfg.r, d_in), doc="offset of Vh"),
    }


@hookimpl
def init(
    layer: nn.Module, params: dict[str, Tensor], cfg: SpectralConfig, name: str, generator: torch.Generator
) -> None:
    copy_triplets(params, singular_triplets(layer, cfg.r, name, generator))


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor]) -> Tensor:
    h, dh = project(x, params["lora_Vh"]), project(x, params["lora_dV"])
    U, S, dU = (params[name].to(h.dtype) for name in ("lora_U", "lora_S", "lora_dU"))
    dh = S * dh
    return F.linear(torch.addcmul(dh, S, h), dU).add_(F.linear(dh, U)).to(y.dtype).add_(y)


@hookimpl
def fingerprint(layer: nn.Module) -> Tensor:
    return sketch(layer)
