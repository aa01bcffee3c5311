"""VeRA: one frozen random pair for all layers of a size, and two trained vectors for each layer.

    y = W x + b + λ_b ⊙ B (λ_d ⊙ A x)

A (r, d_in) and B (d_out, r) are frozen, random (U(±√(6 / columns))) and shared by all layers of that width. λ_d (r)
starts as d0 and is trained as an offset from it, λ_b (d_out) as zeros, which makes step 0 the identity. Needs nothing
of the base. r + d_out parameters a layer, r (d_in + d_out) multiply-accumulates per token; memory and file hold A and B
once for each width, so that a layer more adds two vectors.

Kopiczko, Blankevoort, Asano: VeRA, 2023 (ICLR 2024), arXiv:2310.11454.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lite_core import ConfigError, ParamSpec, RankConfig, Target, hookimpl, project

from ._peft import Pair, Sizes, fill_corners, vera_from_peft, vera_to_peft

BENCH = {"lr": 1e-1}


@dataclass(frozen=True, kw_only=True)
class VeRAConfig(RankConfig):
    """Config of VeRA. Ranks are larger than LoRA's, since they cost one number a layer.

    d0       where λ_d starts, not 0
    corners  layers of several widths use the corners of one pair, that of the largest widths, as in the peft package:
             what `export_peft` needs then; False draws a pair for each width
    """

    variant = "vera"

    r: int = 64
    d0: float = 0.1
    corners: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.d0) and self.d0):
            raise ConfigError(f"VeRAConfig(d0={self.d0!r}): both vectors at 0 would have no gradient; give d0 a number")


Config = VeRAConfig


def _uniform(tensor: Tensor, generator: torch.Generator) -> None:
    bound = math.sqrt(6 / tensor.shape[1])
    tensor.uniform_(-bound, bound, generator=generator)


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: VeRAConfig) -> dict[str, ParamSpec]:
    return {
        "lora_A": ParamSpec((cfg.r, d_in), _uniform, trainable=False, shared="A"),
        "lora_B": ParamSpec((d_out, cfg.r), _uniform, trainable=False, shared="B"),
        "lora_d": ParamSpec((cfg.r,), doc="offset of λ_d from d0"),
        "lora_b": ParamSpec((d_out,), doc="λ_b"),
    }


@hookimpl
def group_init(targets: tuple[Target, ...], cfg: VeRAConfig) -> None:
    if cfg.corners:
        fill_corners(targets, ("lora_A", "lora_B"))


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: VeRAConfig) -> Tensor:
    hidden = project(x, params["lora_A"])
    hidden = hidden * (cfg.d0 + params["lora_d"]).to(hidden.dtype)
    up = F.linear(hidden, params["lora_B"].to(hidden.dtype))
    return (up * params["lora_b"].to(up.dtype)).to(y.dtype).add_(y)


@hookimpl
def to_peft(params: dict[str, Tensor], cfg: VeRAConfig, layer: nn.Module) -> Pair:
    return vera_to_peft("vera", params, cfg, layer)


@hookimpl
def from_peft(config: dict[str, Any], tensors: dict[str, Tensor], name: str, sizes: Sizes) -> Pair | None:
    return vera_from_peft("vera", config, tensors, name, sizes)
