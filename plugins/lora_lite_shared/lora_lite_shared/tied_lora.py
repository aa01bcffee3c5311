"""Tied-LoRA: one trained low-rank pair for all layers of a size, and two trained vectors for each layer.

    y = W x + b + s · v ⊙ B (u ⊙ A x),   s = alpha / r

A (r, d_in) and B (d_out, r) are trained and shared by all layers of that width; u (r) and v (d_out) are each layer's
own, trained as offsets from 1. A starts as U(±1/√d_in), B as zeros, which makes step 0 the identity. Needs nothing of
the base. r + d_out parameters a layer and r (d_in + d_out) for all of a size; r (d_in + d_out) multiply-accumulates per
token. The peft package does not have it; `export_lora` writes it as a LoRA for each layer.

Renduchintala, Konuk, Kuchaiev: Tied-LoRA, 2023 (NAACL 2024), arXiv:2311.09578.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_lite_core import DropoutConfig, ParamSpec, dropped, hookimpl, project

BENCH = {"lr": 2e-2}


@dataclass(frozen=True, kw_only=True)
class TiedLoRAConfig(DropoutConfig):
    """Config of Tied-LoRA.

    vectors  train u and v, too; False leaves them at 1, so that all layers of a size get the same change
    """

    variant = "tied_lora"

    vectors: bool = True


Config = TiedLoRAConfig


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: TiedLoRAConfig) -> dict[str, ParamSpec]:
    pair = {
        "lora_A": ParamSpec((cfg.r, d_in), "kaiming_uniform", shared="A"),
        "lora_B": ParamSpec((d_out, cfg.r), shared="B"),
    }
    if not cfg.vectors:
        return pair
    own = {"lora_u": ParamSpec((cfg.r,), doc="offset of u from 1"), "lora_v": ParamSpec((d_out,), doc="of v from 1")}
    return {**pair, **own}


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: TiedLoRAConfig, training: bool) -> Tensor:
    hidden = project(dropped(x, cfg, training), params["lora_A"])
    if cfg.scale != 1.0:
        hidden = hidden * cfg.scale
    B = params["lora_B"]
    if cfg.vectors:
        hidden = torch.addcmul(hidden, hidden, params["lora_u"].to(hidden.dtype))
        B = torch.addcmul(B, B, params["lora_v"][:, None])
    return F.linear(hidden, B.to(hidden.dtype)).to(y.dtype).add_(y)
