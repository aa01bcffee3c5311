"""PVeRA: VeRA whose r hidden values are drawn in training from a normal distribution that depends on the input.

    y = W x + b + λ_b ⊙ B h,   h = μ + ε ⊙ exp(½ ρ) in training, μ in evaluation,   ε ~ N(0, 1)
    (μ, ρ) = λ_d ⊙ A x

A (2 r, d_in) and B (d_out, r) are frozen, random (U(±√(6 / columns))) and shared by all layers of that width; the first
r rows of A give the mean μ, the others ρ, the logarithm of the variance. λ_d (2 r) starts as d0 and is trained as an
offset from it, λ_b (d_out) as zeros, which makes step 0 the identity. Needs nothing of the base. 2 r + d_out parameters
a layer; r (2 d_in + d_out) multiply-accumulates per token in training, VeRA's in evaluation. A layer more adds two
vectors to memory and file.

Fillioux, Ferrante, Cournède, Vakalopoulou, Christodoulidis: PVeRA: Probabilistic Vector-Based Random Matrix Adaptation,
2025 (WACV 2026), arXiv:2512.07703; as in the peft package.
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
class PVeRAConfig(RankConfig):
    """Config of PVeRA.

    d0       where λ_d starts, not 0
    corners  layers of several widths use the corners of one pair, that of the largest widths, as in the peft package:
             what `export_peft` needs then; False draws a pair for each width
    """

    variant = "pvera"

    r: int = 64
    d0: float = 0.1
    corners: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.d0) and self.d0):
            raise ConfigError(
                f"PVeRAConfig(d0={self.d0!r}): both vectors at 0 would have no gradient; give d0 a number"
            )


Config = PVeRAConfig


def _uniform(tensor: Tensor, generator: torch.Generator) -> None:
    bound = math.sqrt(6 / tensor.shape[1])
    tensor.uniform_(-bound, bound, generator=generator)


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: PVeRAConfig) -> dict[str, ParamSpec]:
    return {
        "lora_A": ParamSpec((2 * cfg.r, d_in), _uniform, trainable=False, shared="A", doc="of the means, then of ρ"),
        "lora_B": ParamSpec((d_out, cfg.r), _uniform, trainable=False, shared="B"),
        "lora_d": ParamSpec((2 * cfg.r,), doc="offset of λ_d from d0"),
        "lora_b": ParamSpec((d_out,), doc="λ_b"),
    }


@hookimpl
def group_init(targets: tuple[Target, ...], cfg: PVeRAConfig) -> None:
    if cfg.corners:
        fill_corners(targets, ("lora_A", "lora_B"))


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: PVeRAConfig, training: bool) -> Tensor:
    rows = 2 * cfg.r if training else cfg.r
    hidden = project(x, params["lora_A"][:rows])
    hidden = hidden * (cfg.d0 + params["lora_d"][:rows]).to(hidden.dtype)
    if training:
        mean, rho = hidden.chunk(2, dim=-1)
        hidden = mean + torch.randn_like(rho) * torch.exp(rho / 2)
    up = F.linear(hidden, params["lora_B"].to(hidden.dtype))
    return (up * params["lora_b"].to(up.dtype)).to(y.dtype).add_(y)


@hookimpl
def to_peft(params: dict[str, Tensor], cfg: PVeRAConfig, layer: nn.Module) -> Pair:
    return vera_to_peft("pvera", params, cfg, layer)


@hookimpl
def from_peft(config: dict[str, Any], tensors: dict[str, Tensor], name: str, sizes: Sizes) -> Pair | None:
    return vera_from_peft("pvera", config, tensors, name, sizes)
