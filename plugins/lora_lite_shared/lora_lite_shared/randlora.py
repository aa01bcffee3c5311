"""RandLoRA: a full-rank update as a sum of frozen random products of low rank, with trained diagonals between them.

    y = W x + b + s · Σ_j B_j Λ_j A Γ_j x,   j < n = ⌈m / r⌉,   m = min(d_in, d_out),   s = alpha / r

A (r, m) and the n matrices of B (M, n, r), M = max(d_in, d_out), are random with variance 1, frozen, and shared by the
layers of a size; where d_out < d_in the sum is transposed. Column k of B_j is column k n + j of B's n r columns, the
peft package's order. Λ (r, n) starts as zeros, which makes step 0 the identity, Γ (n, m) as 1/m and is trained as an
offset from it: the change has rank r until Γ moves. Needs nothing of the base. n (r + m) parameters a layer, the fewer
the larger r is; n r (m + M) multiply-accumulates per token and n r m a call. B is as large as a weight, in memory and
file once for each size.

Albert, Zhang, Saratchandran, Rodriguez-Opazo, van den Hengel, Abbasnejad: RandLoRA, 2025 (ICLR), arXiv:2502.00987.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lite_core import LowRankConfig, ParamSpec, Target, hookimpl, project

from ._peft import Pair, Sizes, fill_corners
from ._peft_randlora import randlora_from_peft, randlora_to_peft

BENCH = {"lr": 1e-2}


@dataclass(frozen=True, kw_only=True)
class RandLoRAConfig(LowRankConfig):
    """Config of RandLoRA; the authors' alpha is 20 r.

    sparse   draw -1, 0 and 1 (with probabilities 1/6, 2/3, 1/6, scaled to variance 1) for A and B, not uniform numbers
    corners  layers of several sizes use the corners of one pair, that of the largest, as in the peft package: what
             `export_peft` needs then; False draws a pair for each size
    """

    variant = "randlora"

    r: int = 32
    sparse: bool = False
    corners: bool = False


Config = RandLoRAConfig


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: RandLoRAConfig) -> dict[str, ParamSpec]:
    m, M = sorted((d_in, d_out))
    n = -(-m // cfg.r)

    def draw(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.uniform_(-(3**0.5), 3**0.5, generator=generator)
        if cfg.sparse:
            tensor.div_(3**0.5 * 2 / 3).trunc_().mul_(3**0.5)  # beyond 2/3 of the bound: a third of the entries

    return {
        "lora_A": ParamSpec((cfg.r, m), draw, trainable=False, shared="A"),
        "lora_B": ParamSpec((M, n, cfg.r), draw, trainable=False, shared="B"),
        "lora_l": ParamSpec((cfg.r, n), doc="Λ"),
        "lora_g": ParamSpec((n, m), doc="offset of Γ from 1/m"),
    }


@hookimpl
def group_init(targets: tuple[Target, ...], cfg: RandLoRAConfig) -> None:
    if cfg.corners:
        fill_corners(targets, ("lora_A", "lora_B"))


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: RandLoRAConfig) -> Tensor:
    A, B, l, g = (params[name] for name in ("lora_A", "lora_B", "lora_l", "lora_g"))
    small, l, large = A.unsqueeze(1) * (g + 1 / A.shape[1]), l * cfg.scale, B.flatten(1)
    few = x.numel() <= A.shape[1] * (x.shape[-1] if x.is_floating_point() else 1)  # rows; else Λ is put on the matrix
    small = (small if few else small * l.unsqueeze(2)).flatten(0, 1)  # row k n + j is row k of Λ_j A Γ_j
    first, second = (small, large) if large.shape[0] == y.shape[-1] else (large.T, small.T)
    hidden = project(x, first)
    hidden = hidden * l.flatten().to(hidden.dtype) if few else hidden
    return F.linear(hidden, second.to(hidden.dtype)).to(y.dtype).add_(y)


@hookimpl
def to_peft(params: dict[str, Tensor], cfg: RandLoRAConfig, layer: nn.Module, name: str, sizes: Sizes) -> Pair:
    return randlora_to_peft(params, cfg, layer, name, sizes)


@hookimpl
def from_peft(config: dict[str, Any], tensors: dict[str, Tensor], name: str, sizes: Sizes) -> Pair | None:
    return randlora_from_peft(config, tensors, sizes[name]) if config["peft_type"] == "RANDLORA" else None
