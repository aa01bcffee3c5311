"""DeLoRA: a low-rank update whose strength is one trained number, whatever the factors' norms.

    y = W x + b + (λ/r) · [ B Ξ A − B₀ Ξ₀ A₀ ] (w ⊙ x),   Ξᵢ = 1 / (‖aᵢ‖ ‖bᵢ‖),   w = column norms of W,   λ = λ₀ + δ

aᵢ is row i of A (r, d_in), bᵢ column i of B (d_out, r). A₀ and B₀ start as U(±1/√fan_in) and stay frozen; the offsets
dA = A − A₀, dB = B − B₀ and δ are trained from zero. Identity at step 0 because the bracket is computed as
dB Ξ A + B₀ (Ξ dA + (Ξ − Ξ₀) A₀), in which every term has a factor that is zero. With frozen_copy=False there is no
second term, B starts at zero and norms are held above 1e-4: the form of the peft package, whose first step jumps to
full strength whatever the learning rate. Needs the column norms of the base, made at attach and not saved.
r (d_in + d_out) + 1 parameters; 2 r (d_in + d_out) multiply-accumulates per token with copies, half without.

Bini, Girrbach, Akata: Decoupling Angles and Strength in Low-rank Adaptation, 2025 (ICLR), arXiv:2503.18225.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lite_core import ConfigError, ParamSpec, RankConfig, dense_weight, hookimpl, layer_dtype, project

from . import _peft_norms


@dataclass(frozen=True, kw_only=True)
class DeLoRAConfig(RankConfig):
    """Config of DeLoRA.

    lambda0      strength λ at the start
    frozen_copy  subtract the start, so that training begins smoothly from the identity
    """

    variant = "delora"

    lambda0: float = 15.0
    frozen_copy: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lambda0 > 0:
            raise ConfigError(f"DeLoRAConfig(lambda0={self.lambda0!r}): the strength is a number above 0")


Config = DeLoRAConfig
to_peft, from_peft = hookimpl(_peft_norms.delora_to_peft), hookimpl(_peft_norms.delora_from_peft)


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: DeLoRAConfig, layer: nn.Module) -> dict[str, ParamSpec]:
    full = torch.promote_types(layer_dtype(layer), torch.float32)
    norms = ParamSpec((d_in,), as_buffer=True, persistent=False, dtype=full, doc="column norms of the base")
    shared = {"lora_lambda": ParamSpec((1,), doc="offset of λ from lambda0"), "lora_w": norms}
    A, B = (cfg.r, d_in), (d_out, cfg.r)
    if not cfg.frozen_copy:
        return {"lora_A": ParamSpec(A, init="kaiming_uniform"), "lora_B": ParamSpec(B), **shared}
    frozen = {name: ParamSpec(s, "kaiming_uniform", trainable=False) for name, s in (("lora_A0", A), ("lora_B0", B))}
    return {**frozen, "lora_dA": ParamSpec(A), "lora_dB": ParamSpec(B), **shared}


@hookimpl
def init(layer: nn.Module, params: dict[str, Tensor]) -> None:
    params["lora_w"].copy_(dense_weight(layer).to(params["lora_w"].dtype).square().sum(0).sqrt())


def _xi(A: Tensor, B: Tensor) -> Tensor:
    """Ξ (r,)."""
    return (A.square().sum(1) * B.square().sum(0)).clamp_min(1e-16).rsqrt()


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: DeLoRAConfig) -> Tensor:
    full = torch.promote_types(y.dtype, torch.float32)
    p = {name: tensor.to(full) for name, tensor in params.items()}
    w, strength = p["lora_w"], (cfg.lambda0 + p["lora_lambda"]) / cfg.r
    if not cfg.frozen_copy:
        A, B = p["lora_A"], p["lora_B"]
        xi = (A.square().sum(1).clamp_min(1e-8) * B.square().sum(0).clamp_min(1e-8)).rsqrt()  # B is zero at first
        hidden = project(x, A * w)
        return _up(hidden * (strength * xi), B, hidden).to(y.dtype).add_(y)
    A0, B0, dA, dB = p["lora_A0"], p["lora_B0"], p["lora_dA"], p["lora_dB"]
    start, now = strength * _xi(A0, B0), strength * _xi(A0 + dA, B0 + dB)
    h0, dh = project(x, A0 * w), project(x, dA * w)
    delta = _up(now * (h0 + dh), dB, h0).add_(_up(torch.addcmul(now * dh, now - start, h0), B0, h0))
    return delta.to(y.dtype).add_(y)


def _up(hidden: Tensor, B: Tensor, like: Tensor) -> Tensor:
    """B · hidden (..., d_out) in the dtype of the other large products."""
    return F.linear(hidden.to(like.dtype), B.to(like.dtype))
