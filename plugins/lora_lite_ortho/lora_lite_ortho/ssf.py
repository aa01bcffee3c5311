"""SSF: every output of a layer is scaled and shifted.

    y' = (1 + g) ⊙ (W x + b) + β

g and β (d_out) are trained from zero, the offsets of the published scale 1 + g and shift β; so step 0 is the identity
(the authors' code draws both with a deviation of 0.02 around it). The bias is scaled too. Needs nothing of the base.
2 d_out parameters, d_out multiplications and additions per token; merges into the weight and the bias. Published for
every operation of a network, its norms and convolutions, too: those of norms are the variant `ln_tuning`.

Lian, Zhou, Feng, Wang: Scaling & Shifting Your Features, 2022 (NeurIPS), arXiv:2210.08817.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lite_core import AdapterConfig, ParamSpec, hookimpl

from ._gates import shifted

BENCH = {"lr": 3e-2}


@dataclass(frozen=True, kw_only=True)
class SSFConfig(AdapterConfig):
    """Config of SSF; nothing beyond what every adapter has."""

    variant = "ssf"


Config = SSFConfig


@hookimpl
def param_specs(d_out: int) -> dict[str, ParamSpec]:
    return {
        "lora_g": ParamSpec((d_out,), doc="offset of the scale from 1"),
        "lora_shift": ParamSpec((d_out,), doc="shift β"),
    }


@hookimpl
def forward(y: Tensor, params: dict[str, Tensor]) -> Tensor:
    full = torch.promote_types(y.dtype, torch.float32)
    return shifted(y, params["lora_g"].to(full), params["lora_shift"].to(full))
