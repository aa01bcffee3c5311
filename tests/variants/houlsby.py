"""Bottleneck adapters after a block: h ← h + U relu(D h), U = 0 at the start.

Houlsby, Giurgiu, Jastrzebski, Morrone, de Laroussilhe, Gesmundo, Attariyan, Gelly, 2019, arXiv:1902.00751.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from lora_lite_core import ParamSpec, RankConfig, hookimpl


@dataclass(frozen=True, kw_only=True)
class HoulsbyConfig(RankConfig):
    variant = "houlsby"


Config = HoulsbyConfig
LAYERS = ("block",)
AFFINE = False
BENCH = {"lr": 5e-3}


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: HoulsbyConfig) -> dict[str, ParamSpec]:
    return {"lora_D": ParamSpec((cfg.r, d_out), "kaiming_uniform"), "lora_U": ParamSpec((d_out, cfg.r))}


@hookimpl
def forward(y: Tensor, params: dict[str, Tensor]) -> Tensor:
    hidden = F.relu(F.linear(y, params["lora_D"].to(y.dtype)))
    return y + F.linear(hidden, params["lora_U"].to(hidden.dtype)).to(y.dtype)
