"""MELoRA: several small LoRAs side by side, each from its own part of the input to its own part of the output.

    y_i = (W x + b)_i + s · B_i A_i x_i,    i = 1 … n,    s = alpha / r

x_i is the i-th of n equal parts of the input, y_i of the output. A_i (r, d_in / n) starts as U(±1/√(d_in / n)), B_i
(d_out / n, r) as zeros, which makes step 0 the identity; both are trained. The change is block diagonal and of rank n
r, with the parameters of one LoRA of rank r. lora_A holds the A_i one beside the other, lora_B the B_i one below the
other. Needs nothing of the base; n divides d_in and d_out. r (d_in + d_out) parameters and as many
multiply-accumulates per token.

Ren, Shi, Wu, Zhang, Ren, de Rijke, Chen, Pei: MELoRA: Mini-Ensemble Low-Rank Adapters for Parameter-Efficient
Fine-Tuning, 2024 (ACL), arXiv:2402.17263.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lite_core import ConfigError, DropoutConfig, ParamSpec, TargetError, dropped, hookimpl

LAYERS = ("linear", "convolution", "experts")
BENCH = {"lr": 1e-2}


@dataclass(frozen=True, kw_only=True)
class MELoRAConfig(DropoutConfig):
    """Config of MELoRA; r is the rank of each small LoRA.

    n  how many there are; divides the d_in and the d_out of every target
    """

    variant = "melora"

    n: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n < 1:
            raise ConfigError(f"MELoRAConfig(n={self.n!r}): a number of LoRAs is a whole number of at least 1")


Config = MELoRAConfig


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: MELoRAConfig) -> dict[str, ParamSpec]:
    if d_in % cfg.n or d_out % cfg.n:
        fitting = [n for n in range(1, 129) if math.gcd(d_in, d_out) % n == 0]
        raise TargetError(f"MELoRAConfig(n={cfg.n}) on a layer {d_in} → {d_out}: {fitting} divide both")

    def uniform(A: Tensor, generator: torch.Generator) -> None:
        bound = math.sqrt(cfg.n / d_in)
        A.uniform_(-bound, bound, generator=generator)

    return {
        "lora_A": ParamSpec((cfg.r, d_in), uniform, doc="the A_i, one beside the other"),
        "lora_B": ParamSpec((d_out, cfg.r), doc="the B_i, one below the other"),
    }


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: MELoRAConfig, training: bool) -> Tensor:
    A, B = (params[name].to(x.dtype) for name in ("lora_A", "lora_B"))
    parts = dropped(x, cfg, training).unflatten(-1, (cfg.n, -1))
    hidden = torch.einsum("...ni,rni->...nr", parts, A.unflatten(1, (cfg.n, -1))) * cfg.scale
    return (
        torch.einsum("...nr,nor->...no", hidden, B.unflatten(0, (cfg.n, -1)).to(hidden.dtype)).flatten(-2).to(y.dtype)
        + y
    )
