"""DiReFT: a low-rank change of a block's output, at some or all positions of the sequence.

    h ← h + W₂ᵀ (W₁ h + b)

W₁ (r, d) starts as U(±1/√d), b (r) and W₂ (r, d) as zeros, which makes step 0 the identity; all three are trained. It
is LoReFT without the orthonormal rows and without the difference. Not merged. With first or last only so many
positions at the sequence's ends are changed: of the tokens that `attention_mask` marks, where the model is called with
one; what is generated with a cache is then left alone. Needs nothing of the base. 2 r d + r parameters and 2 r d
multiply-accumulates per token.

Wu, Arora, Wang, Geiger, Jurafsky, Manning, Potts: ReFT: Representation Finetuning for Language Models, 2024 (NeurIPS),
arXiv:2404.03592, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lora_lite_core import ConfigError, ParamSpec, RankConfig, hookimpl

from ._positions import chosen

LAYERS = ("block",)
AFFINE = False
BENCH = {"lr": 1e-2}


@dataclass(frozen=True, kw_only=True)
class DiReFTConfig(RankConfig):
    """Config of DiReFT; r is the rank of the change.

    first, last  how many positions at the start and at the end are changed; 0 and 0 is all of them
    """

    variant = "direft"

    first: int = 0
    last: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(type(count) is int and count >= 0 for count in (self.first, self.last)):
            raise ConfigError(f"DiReFTConfig(first={self.first!r}, last={self.last!r}): numbers of positions, from 0")


Config = DiReFTConfig


@hookimpl
def param_specs(d_out: int, cfg: DiReFTConfig) -> dict[str, ParamSpec]:
    return {
        "lora_W1": ParamSpec((cfg.r, d_out), "kaiming_uniform", doc="what is read"),
        "lora_W2": ParamSpec((cfg.r, d_out), doc="what is written"),
        "lora_b": ParamSpec((cfg.r,)),
    }


@hookimpl
def forward(y: Tensor, params: dict[str, Tensor], cfg: DiReFTConfig, context: Mapping[str, Any]) -> Tensor:
    W1, W2, b = (params[name].to(y.dtype) for name in ("lora_W1", "lora_W2", "lora_b"))
    change = F.linear(F.linear(y, W1, b), W2.T).to(y.dtype)
    if cfg.first or cfg.last:
        change = change * chosen(y, cfg.first, cfg.last, context)
    return change + y
