"""IA3: a trainable gate on every output of a layer.

    y' = (1 + g) ⊙ (W x + b)

g (d_out) is trained from zero, the offset of the published gate l = 1 + g; so step 0 is the identity, weight decay
pulls towards the base model, and low precision can still move it. The bias is gated too. Needs nothing of the base.
d_out parameters and multiplications per token. Published for k_proj and v_proj, beside `ia3_ff` on the feed-forward's
second layer; trains well on every layer with a learning rate around 5e-3 and no weight decay.

Liu, Tam, Muqeeth, Mohta, Huang, Bansal, Raffel: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
In-Context Learning, 2022, arXiv:2205.05638.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lite_core import AdapterConfig, ParamSpec, hookimpl

from . import _peft_gates
from ._gates import gated


@dataclass(frozen=True, kw_only=True)
class IA3Config(AdapterConfig):
    """Config of IA3; nothing beyond what every adapter has."""

    variant = "ia3"


Config = IA3Config
to_peft, from_peft = hookimpl(_peft_gates.ia3_to_peft), hookimpl(_peft_gates.ia3_from_peft)


@hookimpl
def param_specs(d_out: int) -> dict[str, ParamSpec]:
    return {"lora_g": ParamSpec((d_out,), doc="offset of the output gate from 1")}


@hookimpl
def forward(y: Tensor, params: dict[str, Tensor]) -> Tensor:
    return gated(y, 1 + params["lora_g"].to(torch.promote_types(y.dtype, torch.float32)))
