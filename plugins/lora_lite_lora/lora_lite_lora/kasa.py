"""KaSA: the smallest singular triplets of the weight are taken out, and a low-rank product with singular values of its
own is learnt in their place.

    y = W x + b − U V x + s · B diag(λ) A x,   s = alpha / r,   U V = Σ of the r smallest uᵢ σᵢ vᵢᵀ of W

U (d_out, r) and V (r, d_in) are frozen; A (r, d_in) starts as U(±1/√d_in), λ (r) as N(0, 1), B (d_out, r) as zeros; all
three are trained. The published form writes W − U V over W; here the weight stays, and both compute the same. So step 0
is not the identity but the base without its r smallest triplets, the nearest weight of that rank: the output of a layer
moves by at most σ ‖x‖, σ being the r-th smallest singular value. With r far below d_in and d_out, and a weight whose
singular values fall, that is little. `penalty` is β ‖λ‖² + γ (‖BᵀB − I‖ + ‖A Aᵀ − I‖). Dropout acts on what A reads
alone. Reads the dense weight at attach; a file only fits its base. r (d_in + d_out + 1) parameters, 2 r (d_in + d_out)
multiply-accumulates per token.

Wang, Jiang, Park, Kim, Tang: KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models, 2024 (ICLR
2025), arXiv:2412.06071.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lite_core import ConfigError, DropoutConfig, ParamSpec, TargetError, dropped, hookimpl, project, sketch

from . import _peft_kasa

BENCH = {"lr": 5e-3}
IDENTITY_ATOL = 0.1
IDENTITY_REASON = "the r smallest singular triplets are taken out of the weight; how much that is depends on the base"


@dataclass(frozen=True, kw_only=True)
class KaSAConfig(DropoutConfig):
    """Config of KaSA.

    beta   β, weight of the singular values' size in the penalty
    gamma  γ, weight of the distance of A and B from orthonormal ones
    """

    variant = "kasa"

    beta: float = 1e-4
    gamma: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not min(self.beta, self.gamma) >= 0:
            raise ConfigError(f"KaSAConfig(beta={self.beta!r}, gamma={self.gamma!r}): weights are numbers from 0")


Config = KaSAConfig
to_peft, from_peft = hookimpl(_peft_kasa.to_peft), hookimpl(_peft_kasa.from_peft)
fingerprint = hookimpl(lambda layer: sketch(layer))


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: KaSAConfig) -> dict[str, ParamSpec]:
    if cfg.r >= (least := min(d_in, d_out)):
        raise TargetError(f"KaSAConfig(r={cfg.r}) on a layer {d_in} → {d_out}: r is at most {least - 1}, or all is out")
    return {
        "lora_U": ParamSpec((d_out, cfg.r), trainable=False, doc="left singular vectors that are out, times their σ"),
        "lora_V": ParamSpec((cfg.r, d_in), trainable=False, doc="right singular vectors that are out"),
        "lora_A": ParamSpec((cfg.r, d_in), "kaiming_uniform"),
        "lora_l": ParamSpec((cfg.r,), lambda tensor, generator: tensor.normal_(generator=generator), doc="λ"),
        "lora_B": ParamSpec((d_out, cfg.r)),
    }


@hookimpl
def init(layer: nn.Module, params: dict[str, Tensor], cfg: KaSAConfig, generator: torch.Generator) -> None:
    for name, value in _peft_kasa.smallest(layer, cfg.r, generator).items():
        params[name].copy_(value)


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: KaSAConfig, training: bool) -> Tensor:
    h, out = project(dropped(x, cfg, training), params["lora_A"]), project(x, params["lora_V"])
    U, B, l = (params[name].to(h.dtype) for name in ("lora_U", "lora_B", "lora_l"))
    h = torch.cat([h * (cfg.scale * l), out], -1)  # both terms in one product
    return F.linear(h, torch.cat([B, -U], 1)).to(y.dtype).add_(y)


@hookimpl
def penalty(params: dict[str, Tensor], cfg: KaSAConfig) -> Tensor:
    A, B, l = (params[name].to(torch.promote_types(params[name].dtype, torch.float32)) for name in _peft_kasa.TRAINED)
    I = torch.eye(len(l), dtype=l.dtype, device=l.device)
    return cfg.beta * l.square().sum() + cfg.gamma * ((B.T @ B - I).norm() + (A @ A.T - I).norm())
