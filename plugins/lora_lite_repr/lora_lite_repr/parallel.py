"""Parallel adapter: a bottleneck with a nonlinearity beside a block, from its input to its output.

    y = block(x) + s · (U relu(D x + b) + c)

D (r, d) starts as U(±1/√d), U (d, r) and the biases b (r), c (d) as zeros: U = 0 and c = 0 make step 0 the identity.
All are trained; the scale s is a constant. Not affine in x: it cannot be merged. It goes on the model's blocks; the
paper puts it beside the feed-forward part: target_names=("mlp$",) where that is called so. Needs nothing of the base.
2 r d + r + d parameters and 2 r d multiply-accumulates per token.

He, Zhou, Ma, Berg-Kirkpatrick, Neubig: Towards a Unified View of Parameter-Efficient Transfer Learning, 2021 (ICLR
2022), arXiv:2110.04366.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from lora_lite_core import ConfigError, ParamSpec, RankConfig, hookimpl

LAYERS = ("block",)
AFFINE = False
BENCH = {"lr": 5e-3}


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(RankConfig):
    """Config of parallel adapters; r is the width of the bottleneck.

    scale  s; 4 in the paper
    """

    variant = "parallel"

    scale: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.scale, (int, float)) and not isinstance(self.scale, bool)
        if not number or not math.isfinite(self.scale) or not self.scale:
            raise ConfigError(f"ParallelConfig(scale={self.scale!r}): it is a finite number other than 0")


Config = ParallelConfig


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: ParallelConfig) -> dict[str, ParamSpec]:
    return {
        "lora_D": ParamSpec((cfg.r, d_in), "kaiming_uniform", doc="into the bottleneck"),
        "lora_b": ParamSpec((cfg.r,), doc="its bias"),
        "lora_U": ParamSpec((d_out, cfg.r), doc="out of the bottleneck"),
        "lora_c": ParamSpec((d_out,), doc="its bias"),
    }


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: ParallelConfig) -> Tensor:
    D, b, U, c = (params[name].to(x.dtype) for name in ("lora_D", "lora_b", "lora_U", "lora_c"))
    hidden = F.relu(F.linear(x, D, b)) * cfg.scale
    return F.linear(hidden, U, c * cfg.scale).to(y.dtype).add_(y)
