"""HiRA: the weight is multiplied, entry by entry, by one plus a low-rank matrix; the change has full rank.

    W' = W + W ⊙ (B A),   y = W x + b + (W ⊙ (B A)) x

A (r, d_in) starts as U(±1/√d_in), B (d_out, r) as zeros, which makes step 0 the identity. There is no scale. With
dropout, the change reads another part of x at every call of training. Takes the dense weight of the base in every call;
what is trained is relative to it and was made of nothing in it, so that a file may go on another base, as LoRA's may.
r (d_in + d_out) parameters, d_in d_out multiply-accumulates per token and r d_in d_out per call.

Huang, Ko, Zhuang, Tang, Zhang: HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models, 2025
(ICLR), https://openreview.net/forum?id=TwJrTz9cRS.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from lora_lite_core import (
    ConfigError,
    ParamSpec,
    RankConfig,
    base_forward,
    dense_weight,
    hookimpl,
    lowrank_delta,
)

from . import _peft_hira

BENCH = {"lr": 4e-2}


@dataclass(frozen=True, kw_only=True)
class HiRAConfig(RankConfig):
    """Config of HiRA.

    dropout  share of the change's input that is set to zero in training mode, from 0 to below 1; 0 is none
    """

    variant = "hira"

    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.dropout, (int, float)) and not isinstance(self.dropout, bool)
        if not number or not 0 <= self.dropout < 1:
            raise ConfigError(f"HiRAConfig(dropout={self.dropout!r}): dropout is a number from 0 to below 1")


Config = HiRAConfig
to_peft, from_peft = hookimpl(_peft_hira.to_peft), hookimpl(_peft_hira.from_peft)


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: HiRAConfig) -> dict[str, ParamSpec]:
    return {"lora_A": ParamSpec((cfg.r, d_in), "kaiming_uniform"), "lora_B": ParamSpec((d_out, cfg.r))}


@hookimpl
def forward(
    x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: HiRAConfig, layer: nn.Module, training: bool
) -> Tensor:
    A, B = params["lora_A"], params["lora_B"]
    if not x.is_floating_point():  # token ids: their columns of W and of B A, without the whole product
        return y + (base_forward(layer, x) * lowrank_delta(x, A, B)).to(y.dtype)
    if training and cfg.dropout:
        x = F.dropout(x, cfg.dropout)
    weight = dense_weight(layer).to(x.dtype) * (B.to(x.dtype) @ A.to(x.dtype))
    return F.linear(x, weight).to(y.dtype).add_(y)
