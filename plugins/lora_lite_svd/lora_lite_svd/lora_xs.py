"""LoRA-XS: a tiny trained matrix between frozen singular directions of the weight.

    y = W x + b + s · B R A x,   A = diag(S) Vh (r, d_in),   B = U (d_out, r),   s = alpha / r

U, S, Vh are the r largest singular triplets of W, frozen; R (r, r) is trained. Identity at step 0 because R is zero
(the authors' code draws it with a deviation of 1e-5); its gradient is alive from the start. Rows of A carry the
singular values, so the learning rate that fits depends on them. Reads the base's dense weight once, at attach; a file
only fits the weights it was made on. r² parameters, r (d_in + d_out) + r² multiply-accumulates per token.

Bałazy, Banaei, Aberer, Tabor: LoRA-XS, 2024 (ECAI 2025), arXiv:2405.17604.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lite_core import DropoutConfig, ParamSpec, dropped, hookimpl, lowrank_delta, project, sketch

from ._triplets import singular_triplets


@dataclass(frozen=True, kw_only=True)
class LoRAXSConfig(DropoutConfig):
    """Config of LoRA-XS."""

    variant = "lora_xs"


Config = LoRAXSConfig


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: LoRAXSConfig) -> dict[str, ParamSpec]:
    return {
        "lora_A": ParamSpec((cfg.r, d_in), trainable=False, doc="diag(S) Vh"),
        "lora_B": ParamSpec((d_out, cfg.r), trainable=False, doc="U"),
        "lora_R": ParamSpec((cfg.r, cfg.r)),
    }


@hookimpl
def init(layer: nn.Module, params: dict[str, Tensor], cfg: LoRAXSConfig, name: str, generator: torch.Generator) -> None:
    U, S, Vh = singular_triplets(layer, cfg.r, name, generator)
    params["lora_A"].copy_(S[:, None] * Vh)
    params["lora_B"].copy_(U)


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: LoRAXSConfig, training: bool) -> Tensor:
    hidden = project(dropped(x, cfg, training), params["lora_A"])
    return lowrank_delta(hidden, params["lora_R"], params["lora_B"], cfg.scale).to(y.dtype).add_(y)


@hookimpl
def fingerprint(layer: nn.Module) -> Tensor:
    return sketch(layer)
