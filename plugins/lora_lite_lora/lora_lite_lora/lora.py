"""LoRA: a trainable low-rank product beside the frozen weight.

    y = W x + b + s · B (A x),    s = alpha / r  (rslora: alpha / √r);  with bias  + s · (B (A x) + c)

A (r, d_in) starts as U(±1/√d_in), B (d_out, r) as zeros, c (d_out,) too; all are trained. Identity at step 0 because B
and c are zero.
With dropout, A reads another part of x at every call of training. Needs nothing of the base. r (d_in + d_out)
parameters and as many multiply-accumulates per token.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen: LoRA, 2021, arXiv:2106.09685. Rank-stabilised scale (rslora):
Kalajdzievski, 2023, arXiv:2312.03732. Frozen A (freeze_a): Zhang, Zhang, Shi, Chu, Li: LoRA-FA, 2023, arXiv:2308.03303.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lite_core import ConfigError, DropoutConfig, ParamSpec, dropped, hookimpl, lowrank_delta

from . import _peft


def _gaussian(A: Tensor, generator: torch.Generator) -> None:
    A.normal_(std=1 / len(A), generator=generator)


def _orthogonal(A: Tensor, generator: torch.Generator) -> None:
    torch.nn.init.orthogonal_(A, generator=generator)


STARTS = {"kaiming_uniform": "kaiming_uniform", "gaussian": _gaussian, "orthogonal": _orthogonal}


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(DropoutConfig):
    """Config of LoRA.

    rslora    scale by alpha / √r instead of alpha / r: the update keeps its size when r grows
    freeze_a  train B alone (LoRA-FA): half the optimizer state, and r instead of d_in activations kept per token
    bias      train a bias of B, too, scaled as the product is; export_lora refuses it, because a LoRA has none
    init      how A starts: "kaiming_uniform", "gaussian" with a deviation of 1/r, or "orthogonal" rows of length 1
              (columns, where r is above d_in)
    """

    variant = "lora"

    rslora: bool = False
    freeze_a: bool = False
    bias: bool = False
    init: str = "kaiming_uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init not in STARTS:
            raise ConfigError(f"LoRAConfig(init={self.init!r}): A starts as one of {', '.join(map(repr, STARTS))}")

    @property
    def scale(self) -> float:
        alpha = self.r if self.alpha is None else self.alpha
        return alpha / math.sqrt(self.r) if self.rslora else alpha / self.r


Config = LoRAConfig
to_peft, from_peft = hookimpl(_peft.to_peft), hookimpl(_peft.from_peft)


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: LoRAConfig) -> dict[str, ParamSpec]:
    factors = {
        "lora_A": ParamSpec((cfg.r, d_in), STARTS[cfg.init], trainable=not cfg.freeze_a, doc="directions in the input"),
        "lora_B": ParamSpec((d_out, cfg.r), doc="what each direction adds to the output"),
    }
    return {**factors, "lora_bias": ParamSpec((d_out,), doc="B's bias")} if cfg.bias else factors


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: LoRAConfig, training: bool) -> Tensor:
    x = dropped(x, cfg, training)
    delta = lowrank_delta(x, params["lora_A"], params["lora_B"], cfg.scale)
    if cfg.bias:
        delta = delta.add_(params["lora_bias"].to(delta.dtype), alpha=cfg.scale)
    return delta.to(y.dtype).add_(y)
