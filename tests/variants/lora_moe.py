"""A mixture of LoRAs: every layer has several, and a router that weighs them by the layer's own input.

    y = W x + b + s · Σ_e p_e B_e A_e x,   p = softmax(R x),   s = alpha / r

A_e (r, d_in) start as U(±1/√d_in), B_e (d_out, r) as zeros, which makes step 0 the identity, and the router R (E, d_in) as
zeros: equal shares. All experts are used for every token (soft merging). Not affine in x: it cannot be merged. A holds
the E blocks of r rows, B those of r columns. Needs nothing of the base. E (r d_in + r d_out + d_in) parameters and
multiply-accumulates per token.

Zadouri, Üstün, Ahmadian, Ermiş, Locatelli, Hooker: Pushing Mixture of Experts to the Limit (MoLORA), 2023 (ICLR 2024),
arXiv:2309.05444.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from lora_lite_core import ConfigError, LowRankConfig, ParamSpec, hookimpl

AFFINE = False
BENCH = {"lr": 1e-2}


@dataclass(frozen=True, kw_only=True)
class LoRAMoEConfig(LowRankConfig):
    variant = "lora_moe"
    experts: int = 4

    def __post_init__(self):
        super().__post_init__()
        if self.experts < 1:
            raise ConfigError(f"LoRAMoEConfig(experts={self.experts!r}): at least 1")


Config = LoRAMoEConfig


@hookimpl
def param_specs(d_in, d_out, cfg):
    return {
        "lora_A": ParamSpec((cfg.experts * cfg.r, d_in), "kaiming_uniform"),
        "lora_B": ParamSpec((d_out, cfg.experts * cfg.r)),
        "lora_router": ParamSpec((cfg.experts, d_in)),
    }


@hookimpl
def forward(x, y, params, cfg):
    A, B, router = (params[name].to(x.dtype) for name in ("lora_A", "lora_B", "lora_router"))
    shares = F.linear(x, router).softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
    hidden = F.linear(x, A) * shares.repeat_interleave(cfg.r, -1) * cfg.scale
    return y + F.linear(hidden, B).to(y.dtype)
