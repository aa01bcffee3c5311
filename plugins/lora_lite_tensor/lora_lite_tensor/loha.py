"""LoHa: the change is the entry-by-entry product of two low-rank matrices.

    y = W x + b + s · ((B1 A1) ⊙ (B2 A2)) x,   s = alpha / r

A1, A2 (r, d_in) and B1, B2 (d_out, r) are trained. The product of two matrices of rank r has a rank of up to r². The
start is that of LyCORIS: A1, A2 ~ N(0, 1), B1 ~ N(0, 0.01), B2 = 0, which makes step 0 the identity. (PEFT draws three
of the factors as LoRA does its A, and starts with A2 = 0.) Needs nothing of the base. 2 r (d_in + d_out) parameters.
Where r² is small the change is applied as a product of r² rows and columns, A1's by A2's and B1's by B2's: r² (d_in +
d_out) multiply-accumulates per token; otherwise as a matrix, 2 r d_in d_out per call and d_in d_out per token. For
backward a large matrix is made once more and not kept.

Hyeon-Woo, Ye-Bin, Oh: FedPara, 2021 (ICLR 2022), arXiv:2108.06098. For adapters: Yeh, Hsieh, Gao, Yang, Oh, Gong:
Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation, 2023, arXiv:2309.14859.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lite_core import LowRankConfig, ParamSpec, hookimpl, lowrank_delta

from . import _peft
from ._hadamard import hadamard_delta

BENCH = {"lr": 5e-3}


@dataclass(frozen=True, kw_only=True)
class LoHaConfig(LowRankConfig):
    """Config of LoHa."""

    variant = "loha"


Config = LoHaConfig
to_peft, from_peft = hookimpl(_peft.loha_to_peft), hookimpl(_peft.loha_from_peft)


def _normal(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.normal_(generator=generator)


def _small(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.normal_(std=0.1, generator=generator)


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: LoHaConfig) -> dict[str, ParamSpec]:
    return {
        "lora_A1": ParamSpec((cfg.r, d_in), _normal),
        "lora_B1": ParamSpec((d_out, cfg.r), _small),
        "lora_A2": ParamSpec((cfg.r, d_in), _normal),
        "lora_B2": ParamSpec((d_out, cfg.r)),
    }


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: LoHaConfig) -> Tensor:
    A1, B1, A2, B2 = (params[f"lora_{name}"] for name in ("A1", "B1", "A2", "B2"))
    (d_out, r), d_in = B1.shape, A1.shape[1]
    if not x.is_floating_point():  # token ids: columns of the one and of the other
        return y + (lowrank_delta(x, A1, B1, cfg.scale) * lowrank_delta(x, A2, B2)).to(y.dtype)
    if r * r * (d_in + d_out) < d_in * d_out:
        A, B = (A1[:, None] * A2).flatten(0, 1), (B1[:, :, None] * B2[:, None]).flatten(1)
        return lowrank_delta(x, A, B, cfg.scale).to(y.dtype).add_(y)
    return hadamard_delta(x, A1, B1 * cfg.scale, A2, B2).to(y.dtype).add_(y)
