"""MoLoRA: every layer has several LoRAs, and a router that weighs them by the layer's own input.

    y = W x + b + s · Σ_e p_e B_e A_e x,    p = softmax(G x),    s = alpha / r

A_e (r, d_in) start as U(±1/√d_in), the router G (experts, d_in) too, B_e (d_out, r) as zeros, which makes step 0 the
identity; all are trained. lora_A holds the A_e one below the other, lora_B the B_e one beside the other. With top_k =
0 every token uses all experts (soft merging); else p is zero for all but the top_k experts with the largest G x, and
the softmax is over those. Not affine in x: it cannot be merged. Needs nothing of the base. experts · (r d_in + r d_out
+ d_in) parameters and as many multiply-accumulates per token, with top_k too: experts are weighed, not left out.

Zadouri, Üstün, Ahmadian, Ermiş, Locatelli, Hooker: Pushing Mixture of Experts to the Limit (MoLORA), 2023 (ICLR 2024),
arXiv:2309.05444.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_lite_core import ConfigError, DropoutConfig, ParamSpec, dropped, hookimpl, project

AFFINE = False
BENCH = {"lr": 1e-2}


@dataclass(frozen=True, kw_only=True)
class MoLoRAConfig(DropoutConfig):
    """Config of MoLoRA; r is the rank of each expert.

    experts  how many LoRAs a layer has
    top_k    how many of them a token uses; 0 is all
    """

    variant = "molora"

    experts: int = 4
    top_k: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts < 1:
            raise ConfigError(f"MoLoRAConfig(experts={self.experts!r}): it is a whole number of at least 1")
        if not 0 <= self.top_k <= self.experts:
            raise ConfigError(f"MoLoRAConfig(top_k={self.top_k!r}): from 1 to experts={self.experts}, or 0 for all")


Config = MoLoRAConfig


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: MoLoRAConfig) -> dict[str, ParamSpec]:
    return {
        "lora_A": ParamSpec((cfg.experts * cfg.r, d_in), "kaiming_uniform", doc="the A_e, one below the other"),
        "lora_B": ParamSpec((d_out, cfg.experts * cfg.r), doc="the B_e, one beside the other"),
        "lora_G": ParamSpec((cfg.experts, d_in), "kaiming_uniform", doc="router"),
    }


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: MoLoRAConfig, training: bool) -> Tensor:
    logits = project(x, params["lora_G"])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if 0 < cfg.top_k < cfg.experts:
        best = logits.topk(cfg.top_k, -1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, best.indices, best.values)
    hidden = project(dropped(x, cfg, training), params["lora_A"])
    shares = (logits.softmax(-1) * cfg.scale).to(hidden.dtype)
    hidden = (hidden.unflatten(-1, (cfg.experts, cfg.r)) * shares[..., None]).flatten(-2)
    return F.linear(hidden, params["lora_B"].to(hidden.dtype)).to(y.dtype).add_(y)
