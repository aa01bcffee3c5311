"""BLoB: LoRA whose A is a Gaussian with trained mean and deviation, sampled in training.

    y = W x + b + s · B A x,   A = M + G² ⊙ E,   E ~ N(0, 1) (flipout: E is t Eᵢⱼ s with fresh signs t, s for every row),
    loss + kl · Σ [ (M² + G⁴) / 2σ² − ½ − log(G² / σ) ],   s = alpha / r

In evaluation A is its mean M (r, d_in), which starts as U(±1/√d_in). G (r, d_in) starts as U(ε/√2, ε), ε = 0.05, and
B (d_out, r) as zeros: step 0 is the identity whatever is drawn. kl is 1 / the number of training examples where the loss
is their mean, σ the prior's deviation. Needs nothing of the base. r (2 d_in + d_out) parameters.

Wang, Shi, Han, Metaxas, Wang: BLoB, 2024 (NeurIPS), arXiv:2406.11675, equations 5 to 10.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from lora_lite_core import LowRankConfig, ParamSpec, hookimpl

BENCH = {"lr": 1e-2}


@dataclass(frozen=True, kw_only=True)
class BLoBConfig(LowRankConfig):
    variant = "blob"
    prior: float = 0.2
    kl: float = 1e-6


Config = BLoBConfig


@hookimpl
def param_specs(d_in, d_out, cfg):
    def start(tensor, generator):
        tensor.uniform_(0.05 / 2**0.5, 0.05, generator=generator)

    return {
        "lora_A": ParamSpec((cfg.r, d_in), "kaiming_uniform", doc="M"),
        "lora_G": ParamSpec((cfg.r, d_in), start, doc="root of the deviation"),
        "lora_B": ParamSpec((d_out, cfg.r)),
    }


@hookimpl
def forward(x, y, params, cfg, training):
    M, G, B = (params[name].to(x.dtype) for name in ("lora_A", "lora_G", "lora_B"))
    hidden = F.linear(x, M)
    if training:
        signs = (torch.randint_like(like, 2) * 2 - 1 for like in (x, hidden))
        hidden = hidden + F.linear(x * next(signs), G.square() * torch.randn_like(G)) * next(signs)
    return y + (F.linear(hidden, B) * cfg.scale).to(y.dtype)


@hookimpl
def penalty(params, cfg):
    M, deviation = params["lora_A"], params["lora_G"].square()
    terms = (M.square() + deviation.square()) / (2 * cfg.prior**2) - 0.5 - (deviation / cfg.prior).log()
    return cfg.kl * terms.sum()
