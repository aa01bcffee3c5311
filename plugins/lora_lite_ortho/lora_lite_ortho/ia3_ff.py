"""IA3-FF: a trainable gate on every input of a layer, for the second layer of a feed-forward block.

    y = W ((1 + g) ⊙ x) + b

g (d_in) is trained from zero, the offset of the published gate l = 1 + g; so step 0 is the identity. Needs nothing of
the base. d_in parameters and multiplications per token. Published for the layer that ends a feed-forward block
(down_proj, fc2, wo): gating its input is the same as gating the block's inner activation. On a convolution x is a
patch, and with channels=True g is as long as the input has channels, which gates the image itself.

Liu, Tam, Muqeeth, Mohta, Huang, Bansal, Raffel: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
In-Context Learning, 2022, arXiv:2205.05638.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from lora_lite_core import AdapterConfig, ParamSpec, hookimpl

from . import _peft_gates
from ._gates import gated
from ._peft import CONVOLUTIONS


@dataclass(frozen=True, kw_only=True)
class IA3FFConfig(AdapterConfig):
    """Config of IA3-FF.

    channels  on a convolution one gate for each channel of the input, not for each number of a patch
    """

    variant = "ia3_ff"

    channels: bool = False


Config = IA3FFConfig
to_peft, from_peft = hookimpl(_peft_gates.ia3_ff_to_peft), hookimpl(_peft_gates.ia3_ff_from_peft)


@hookimpl
def param_specs(d_in: int, cfg: IA3FFConfig, layer: nn.Module) -> dict[str, ParamSpec]:
    count = layer.in_channels if cfg.channels and isinstance(layer, CONVOLUTIONS) else d_in
    return {"lora_g": ParamSpec((count,), doc="offset of the input gate from 1")}


@hookimpl
def forward_input(x: Tensor, params: dict[str, Tensor], cfg: IA3FFConfig, layer: nn.Module) -> Tensor:
    gate = 1 + params["lora_g"].to(torch.promote_types(x.dtype, torch.float32))
    if cfg.channels and isinstance(layer, CONVOLUTIONS):  # which are the slowest in a patch
        gate = gate.repeat_interleave(prod(layer.kernel_size))
    return gated(x, gate)
