"""Tied-LoRA: one trained pair for all layers of a size, and two trained vectors for each layer.

    y = W x + b + s · v ⊙ B (u ⊙ A x),   s = alpha / r

A (r, d_in) and B (d_out, r) are trained and shared, u (r) and v (d_out) are each layer's own, trained as offsets from 1.
B starts as zeros, which makes step 0 the identity.

Renduchintala, Konuk, Kuchaiev: Tied-LoRA, 2023 (NAACL 2024), arXiv:2311.09578.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from lora_lite_core import LowRankConfig, ParamSpec, hookimpl


@dataclass(frozen=True, kw_only=True)
class TiedLoRAConfig(LowRankConfig):
    """Config of Tied-LoRA."""

    variant = "tied_lora"


Config = TiedLoRAConfig


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: TiedLoRAConfig) -> dict[str, ParamSpec]:
    return {
        "lora_A": ParamSpec((cfg.r, d_in), "kaiming_uniform", shared="A"),
        "lora_B": ParamSpec((d_out, cfg.r), shared="B"),
        "lora_u": ParamSpec((cfg.r,), doc="offset of u from 1"),
        "lora_v": ParamSpec((d_out,), doc="offset of v from 1"),
    }


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: TiedLoRAConfig) -> Tensor:
    A, B, u, v = (params[name].to(x.dtype) for name in ("lora_A", "lora_B", "lora_u", "lora_v"))
    return y + (F.linear(F.linear(x, A) * (1 + u), B) * (1 + v) * cfg.scale).to(y.dtype)
