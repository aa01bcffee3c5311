"""DEFT: a low-dimensional part of what the weight gives is taken out, and something learnt is put in its place.

    W' = (I − Q Zᵀ) W + s Q R,   s = alpha / r,   decomposition "relu": Q = P, Z = relu(P);   "qr": Q = Z = orth(P)

orth(P) are P's columns made orthonormal by Gram-Schmidt, whose signs do not jump as P moves. P (d_out, r) starts as
N(0, 0.02²). R starts as Z₀ᵀ W / s, of the P₀ that P starts as, so that what is put in is what is taken out; here that
start is not stored, and cancels:

    y = W x + b + Q [ s dR x + (Z₀ − Z)ᵀ (W x) ],   P = P₀ + dP

P₀ is frozen, dP (d_out, r) and dR (r, d_in) are trained from zero, which makes step 0 the identity. W x is the layer's
output so far without its bias. With dropout, dR reads another part of x at every call of training. Needs nothing of
the base at attach; a file may go on another base. r (d_in + d_out) parameters, r (d_in + 2 d_out) multiply-accumulates
per token.

Kumar, Anwer, Khan, Khan, Laptev, Cholakkal: DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models, 2025
(NeurIPS), arXiv:2509.22793, with the projectors of the peft package; its para=True, which starts by taking a part of
the weight out, is not here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lite_core import ConfigError, DropoutConfig, ParamSpec, TargetError, dropped, hookimpl, project

from . import _peft_deft

BENCH = {"lr": 1e-2}


@dataclass(frozen=True, kw_only=True)
class DEFTConfig(DropoutConfig):
    """Config of DEFT.

    decomposition  "relu", or "qr": orthonormal directions
    """

    variant = "deft"

    decomposition: str = "relu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decomposition not in ("relu", "qr"):
            raise ConfigError(f"DEFTConfig(decomposition={self.decomposition!r}): give one of relu, qr")


Config = DEFTConfig
to_peft, from_peft = hookimpl(_peft_deft.to_peft), hookimpl(_peft_deft.from_peft)


def _draw(P: Tensor, generator: torch.Generator) -> None:
    P.normal_(std=0.02, generator=generator)


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: DEFTConfig) -> dict[str, ParamSpec]:
    if cfg.r > d_out:
        raise TargetError(f"DEFTConfig(r={cfg.r}) on a layer {d_in} → {d_out}: r is at most {d_out}")
    return {
        "lora_P0": ParamSpec((d_out, cfg.r), _draw, trainable=False, doc="where P starts"),
        "lora_dP": ParamSpec((d_out, cfg.r), doc="offset of P"),
        "lora_dR": ParamSpec((cfg.r, d_in), doc="offset of what is put in"),
    }


@hookimpl
def forward(
    x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: DEFTConfig, layer: nn.Module, training: bool
) -> Tensor:
    full = torch.promote_types(y.dtype, torch.float32)
    P0 = params["lora_P0"].to(full)
    Q, Z = _peft_deft.factors(P0 + params["lora_dP"].to(full), cfg.decomposition)
    change = (_peft_deft.factors(P0, cfg.decomposition)[1] - Z).T.to(y.dtype)
    bias = getattr(layer, "bias", None)
    inner = project(dropped(x, cfg, training), params["lora_dR"]).to(y.dtype) * cfg.scale
    inner = inner + F.linear(y if bias is None else y - bias, change).to(y.dtype)
    return F.linear(inner, Q.to(y.dtype)).to(y.dtype).add_(y)
