"""IA3-FF: a trainable gate on every input of a layer, for the second layer of a feed-forward block.

    y = W ((1 + g) ⊙ x) + b

g (d_in) is trained from zero, the offset of the published gate l = 1 + g; so step 0 is the identity. Needs nothing of
the base. d_in parameters and multiplications per token. Published for the layer that ends a feed-forward block
(down_proj, fc2, wo): gating its input is the same as gating the block's inner activation.

Liu, Tam, Muqeeth, Mohta, Huang, Bansal, Raffel: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
In-Context Learning, 2022, arXiv:2205.05638.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lite_core import AdapterConfig, ParamSpec, hookimpl

from . import _peft
from ._gates import gated


@dataclass(frozen=True, kw_only=True)
class IA3FFConfig(AdapterConfig):
    """Config of IA3-FF; nothing beyond what every adapter has."""

    variant = "ia3_ff"


Config = IA3FFConfig
to_peft, from_peft = hookimpl(_peft.ia3_ff_to_peft), hookimpl(_peft.ia3_ff_from_peft)


@hookimpl
def param_specs(d_in: int) -> dict[str, ParamSpec]:
    return {"lora_g": ParamSpec((d_in,), doc="offset of the input gate from 1")}


@hookimpl
def forward_input(x: Tensor, params: dict[str, Tensor]) -> Tensor:
    return gated(x, 1 + params["lora_g"].to(torch.promote_types(x.dtype, torch.float32)))
