"""LoReFT: a block's output is edited in a low-dimensional subspace, at some or all positions of the sequence.

    h ← h + Rᵀ (W h + b − R h),    W = R + dW

R (r, d) has orthonormal rows: those of lora_R made so by Gram-Schmidt, which starts as a random orthonormal matrix. dW
(r, d) and b (r) start as zeros, which makes step 0 the identity: W starts as R. All three are trained. Not merged.
With first or last only so many positions at the sequence's ends are changed: of the tokens that `attention_mask`
marks, where the model is called with one; what is generated with a cache is then left alone. Needs nothing of the
base. 2 r d + r parameters, 2 r d multiply-accumulates per token and 2 d r² per call.

Wu, Arora, Wang, Geiger, Jurafsky, Manning, Potts: ReFT: Representation Finetuning for Language Models, 2024 (NeurIPS),
arXiv:2404.03592, eq. 2. The authors' code starts W at random, and not at the identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_lite_core import ConfigError, ParamSpec, RankConfig, TargetError, hookimpl

from ._positions import chosen

LAYERS = ("block",)
AFFINE = False
BENCH = {"lr": 1e-2}


@dataclass(frozen=True, kw_only=True)
class LoReFTConfig(RankConfig):
    """Config of LoReFT; r is the dimension of the subspace.

    first, last  how many positions at the start and at the end are changed; 0 and 0 is all of them
    """

    variant = "loreft"

    first: int = 0
    last: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(type(count) is int and count >= 0 for count in (self.first, self.last)):
            raise ConfigError(f"LoReFTConfig(first={self.first!r}, last={self.last!r}): numbers of positions, from 0")


Config = LoReFTConfig


def _orthonormal(R: Tensor, generator: torch.Generator) -> None:
    torch.nn.init.orthogonal_(R, generator=generator)


@hookimpl
def param_specs(d_out: int, cfg: LoReFTConfig) -> dict[str, ParamSpec]:
    if cfg.r > d_out:
        raise TargetError(f"LoReFTConfig(r={cfg.r}) on a block of width {d_out}: r is at most {d_out}")
    return {
        "lora_R": ParamSpec((cfg.r, d_out), _orthonormal, doc="spans the subspace"),
        "lora_dW": ParamSpec((cfg.r, d_out), doc="offset of W from R"),
        "lora_b": ParamSpec((cfg.r,)),
    }


@hookimpl
def forward(y: Tensor, params: dict[str, Tensor], cfg: LoReFTConfig, context: Mapping[str, Any]) -> Tensor:
    with torch.autocast(y.device.type, enabled=False):
        R = params["lora_R"].to(torch.promote_types(y.dtype, torch.float32))
        Q, T = torch.linalg.qr(R.T)
        Q = (Q * T.diagonal().sign()).to(y.dtype)  # or its signs were the library's, and jumped
        change = F.linear(F.linear(y, params["lora_dW"].to(y.dtype), params["lora_b"].to(y.dtype)), Q)
    if cfg.first or cfg.last:
        change = change * chosen(y, cfg.first, cfg.last, context)
    return change + y
