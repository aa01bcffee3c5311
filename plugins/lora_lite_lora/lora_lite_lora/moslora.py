"""MoSLoRA: LoRA with a trained r × r mixer between its factors.

    y = W x + b + s · B (M (A x)),    s = alpha / r

A (r, d_in) starts as U(±1/√d_in), the mixer M (r, r) as a random orthogonal matrix, or as U(±1/√r), B (d_out, r) as
zeros, which makes step 0 the identity; all three are trained. A mixer that is the identity is LoRA: there direction i
of the input goes into direction i of the output alone, here into all of them. Needs nothing of the base. r (d_in +
d_out) + r² parameters and as many multiply-accumulates per token.

Wu, Wang, Zhao, Wong: Mixture-of-Subspaces in Low-Rank Adaptation, 2024 (EMNLP), arXiv:2406.11909.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_lite_core import ConfigError, DropoutConfig, ParamSpec, dropped, hookimpl, project

BENCH = {"lr": 5e-3}


def _orthogonal(M: Tensor, generator: torch.Generator) -> None:
    torch.nn.init.orthogonal_(M, generator=generator)


STARTS = {"orthogonal": _orthogonal, "kaiming_uniform": "kaiming_uniform"}


@dataclass(frozen=True, kw_only=True)
class MoSLoRAConfig(DropoutConfig):
    """Config of MoSLoRA.

    mixer  how M starts: "orthogonal" or "kaiming_uniform"
    """

    variant = "moslora"

    mixer: str = "orthogonal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixer not in STARTS:
            raise ConfigError(f"MoSLoRAConfig(mixer={self.mixer!r}): M starts as one of {', '.join(map(repr, STARTS))}")


Config = MoSLoRAConfig


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: MoSLoRAConfig) -> dict[str, ParamSpec]:
    return {
        "lora_A": ParamSpec((cfg.r, d_in), "kaiming_uniform", doc="directions in the input"),
        "lora_M": ParamSpec((cfg.r, cfg.r), STARTS[cfg.mixer], doc="mixer"),
        "lora_B": ParamSpec((d_out, cfg.r), doc="directions in the output"),
    }


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: MoSLoRAConfig, training: bool) -> Tensor:
    hidden = project(dropped(x, cfg, training), params["lora_A"])
    hidden = F.linear(hidden, params["lora_M"].to(hidden.dtype) * cfg.scale)
    return F.linear(hidden, params["lora_B"].to(hidden.dtype)).to(y.dtype).add_(y)
