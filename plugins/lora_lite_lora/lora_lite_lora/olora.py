"""OLoRA: LoRA that starts from the QR decomposition of the weight.

    published   y = W_res x + b + s · B (A x),   W_res = W − s B0 A0,   W = Q R,   B0 = Q[:, :r],   A0 = R[:r]
    here        y = W x + b + s · [ dB ((A0 + dA) x) + B0 (dA x) ],   A = A0 + dA,   B = B0 + dB,   s = alpha / r

The two are equal, but here the weight is never written. The columns of B0 (d_out, r) are orthonormal, and A0 (r, d_in)
holds what the first r columns of Q have of W. Both are frozen; the offsets dA and dB are trained from zero, which makes
step 0 the identity. Dropout acts on what is learnt alone, so that the start is the identity in training, too. Reads the
base's dense weight once, at attach; a file only fits the weights it was made on. r (d_in + d_out) parameters,
2 r (d_in + d_out) multiply-accumulates per token. In PEFT's folders it is written as a LoRA of rank 2r on the base as
it is, which is what PEFT's own conversion makes; folders where PEFT makes the start anew are read, too.

Büyükakyüz: OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models, 2024, arXiv:2406.01775.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lite_core import DropoutConfig, ParamSpec, TargetError, dense_weight, dropped, hookimpl, lowrank_delta, sketch

from . import _peft_offsets

BENCH = {"lr": 2e-3}


@dataclass(frozen=True, kw_only=True)
class OLoRAConfig(DropoutConfig):
    """Config of OLoRA. alpha only scales what is learnt: A0 and B0 are the same for every alpha."""

    variant = "olora"


Config = OLoRAConfig
to_peft, from_peft = hookimpl(_peft_offsets.to_peft), hookimpl(_peft_offsets.olora_from_peft)


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: OLoRAConfig) -> dict[str, ParamSpec]:
    if cfg.r > min(d_in, d_out):
        raise TargetError(f"OLoRAConfig(r={cfg.r}) on a layer {d_in} → {d_out}: r is at most {min(d_in, d_out)}")
    return {
        "lora_A0": ParamSpec((cfg.r, d_in), trainable=False, doc="the first r rows of R"),
        "lora_B0": ParamSpec((d_out, cfg.r), trainable=False, doc="the first r columns of Q"),
        "lora_dA": ParamSpec((cfg.r, d_in), doc="offset of A0"),
        "lora_dB": ParamSpec((d_out, cfg.r), doc="offset of B0"),
    }


@hookimpl
def init(layer: nn.Module, params: dict[str, Tensor], cfg: OLoRAConfig) -> None:
    weight = dense_weight(layer).double()
    Q = torch.linalg.qr(weight[:, : cfg.r]).Q  # that of the first columns is the start of the whole weight's
    params["lora_A0"].copy_(Q.T @ weight)
    params["lora_B0"].copy_(Q)


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: OLoRAConfig, training: bool) -> Tensor:
    A0, B0, dA, dB = (params[f"lora_{key}"] for key in ("A0", "B0", "dA", "dB"))
    A, B = torch.cat([A0 + dA, dA]), torch.cat([dB, B0], 1)  # both terms in one product
    return lowrank_delta(dropped(x, cfg, training), A, B, cfg.scale).to(y.dtype).add_(y)


@hookimpl
def fingerprint(layer: nn.Module) -> Tensor:
    return sketch(layer)
