"""VeRA: one frozen random pair for all layers of a size, and two trained vectors for each layer.

    y = W x + b + λ_b ⊙ B (λ_d ⊙ A x)

A (r, d_in) and B (d_out, r) are frozen, random, and shared. λ_d (r) starts as 0.1 and is trained as an offset from it,
λ_b (d_out) as zeros, which makes step 0 the identity. r + d_out parameters a layer.

Kopiczko, Blankevoort, Asano: VeRA, 2023 (ICLR 2024), arXiv:2310.11454.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_lite_core import ParamSpec, RankConfig, hookimpl

BENCH = {"lr": 2e-2}


@dataclass(frozen=True, kw_only=True)
class VeRAConfig(RankConfig):
    """Config of VeRA; d0 is where λ_d starts."""

    variant = "vera"

    r: int = 16
    d0: float = 0.1


Config = VeRAConfig


def _kaiming_uniform(tensor: Tensor, generator: torch.Generator) -> None:
    bound = math.sqrt(3 / tensor.shape[1])
    tensor.uniform_(-bound, bound, generator=generator)


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: VeRAConfig) -> dict[str, ParamSpec]:
    return {
        "lora_A": ParamSpec((cfg.r, d_in), _kaiming_uniform, trainable=False, shared="A"),
        "lora_B": ParamSpec((d_out, cfg.r), _kaiming_uniform, trainable=False, shared="B"),
        "lora_d": ParamSpec((cfg.r,), doc="offset of λ_d from d0"),
        "lora_b": ParamSpec((d_out,), doc="λ_b"),
    }


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: VeRAConfig) -> Tensor:
    A, B, d, b = (params[name].to(x.dtype) for name in ("lora_A", "lora_B", "lora_d", "lora_b"))
    return y + (F.linear(F.linear(x, A) * (cfg.d0 + d), B) * b).to(y.dtype)
