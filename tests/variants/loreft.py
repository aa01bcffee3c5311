"""LoReFT: h ← h + Rᵀ (W h + b − R h) at some positions of the sequence, R (r, d) with orthonormal rows.

Wu, Arora, Wang, Geiger, Jurafsky, Manning, Potts: ReFT, 2024 (NeurIPS), arXiv:2404.03592, eq. 2. W starts as R and b as
zeros, so that a fresh adapter changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_lite_core import ParamSpec, RankConfig, hookimpl


@dataclass(frozen=True, kw_only=True)
class LoReFTConfig(RankConfig):
    """first, last  how many positions at the start and at the end are changed; 0 and 0 is all of them"""

    variant = "loreft"

    first: int = 0
    last: int = 0


Config = LoReFTConfig
LAYERS = ("block",)
AFFINE = False
BENCH = {"lr": 5e-3}


def _orthonormal(tensor: Tensor, generator: torch.Generator) -> None:
    torch.nn.init.orthogonal_(tensor, generator=generator)


@hookimpl
def param_specs(d_out: int, cfg: LoReFTConfig) -> dict[str, ParamSpec]:
    square = {"lora_R": ParamSpec((cfg.r, d_out), _orthonormal), "lora_dW": ParamSpec((cfg.r, d_out))}
    return {**square, "lora_b": ParamSpec((cfg.r,))}


@hookimpl
def forward(y: Tensor, params: dict[str, Tensor], cfg: LoReFTConfig) -> Tensor:
    full = torch.promote_types(y.dtype, torch.float32)
    p: dict[str, Any] = {name: tensor.to(full) for name, tensor in params.items()}
    R = torch.linalg.qr(p["lora_R"].T).Q.T
    change = F.linear(F.linear(y.to(full), p["lora_dW"], p["lora_b"]), R.T).to(y.dtype)
    if (cfg.first or cfg.last) and y.dim() > 2:
        at = torch.arange(y.shape[-2], device=y.device)
        change = change * ((at < cfg.first) | (at >= len(at) - cfg.last))[:, None]
    return y + change
