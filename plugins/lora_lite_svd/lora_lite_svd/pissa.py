"""PiSSA: LoRA that starts from the principal singular triplets of the weight.

    published   y = W_res x + b + s · B (A x),   W_res = W − s B0 A0,   A0 = √(S/s) Vh,  B0 = U √(S/s)
    here        y = W x + b + s · [ dB ((A0 + dA) x) + B0 (dA x) ],     A = A0 + dA,  B = B0 + dB,  s = alpha / r

The two are equal, but here the weight is never written. A0 (r, d_in) and B0 (d_out, r) are frozen, the offsets dA and
dB are trained from zero, which is why step 0 is the identity, and why weight decay pulls towards the base model and not
towards a base without its principal part. Under Adam without weight decay the training is that of the published form.
Dropout acts on what is learnt alone, so that the start is the identity in training, too (in the published form it also
drops parts of B0 A0 x). Reads the base's dense weight once, at attach; a file only fits the weights it was made on.
Folders of the peft package are read. r (d_in + d_out) parameters, 2 r (d_in + d_out) multiply-accumulates per token.

Meng, Wang, Zhang: PiSSA, 2024 (NeurIPS), arXiv:2404.02948. With the smallest triplets instead (smallest=True): Wang,
Li, Wang, Chen, Chen: MiLoRA, 2024, arXiv:2406.09044.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lite_core import DropoutConfig, ParamSpec, dropped, hookimpl, project, sketch

from . import _peft
from ._triplets import singular_triplets


@dataclass(frozen=True, kw_only=True)
class PiSSAConfig(DropoutConfig):
    """Config of PiSSA. alpha only scales what is learnt: the start is the same for every alpha.

    smallest  start from the r smallest singular triplets instead (MiLoRA)
    """

    variant = "pissa"

    smallest: bool = False


Config = PiSSAConfig
from_peft = hookimpl(_peft.pissa_from_peft)


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: PiSSAConfig) -> dict[str, ParamSpec]:
    return {
        "lora_A0": ParamSpec((cfg.r, d_in), trainable=False, doc="√(S/s) Vh of the r largest singular triplets"),
        "lora_B0": ParamSpec((d_out, cfg.r), trainable=False, doc="U √(S/s)"),
        "lora_dA": ParamSpec((cfg.r, d_in), doc="offset of A0"),
        "lora_dB": ParamSpec((d_out, cfg.r), doc="offset of B0"),
    }


@hookimpl
def init(layer: nn.Module, params: dict[str, Tensor], cfg: PiSSAConfig, name: str, generator: torch.Generator) -> None:
    U, S, Vh = singular_triplets(layer, cfg.r, name, generator, smallest=cfg.smallest)
    root = (S / cfg.scale).sqrt()
    params["lora_A0"].copy_(root[:, None] * Vh)
    params["lora_B0"].copy_(U * root)


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: PiSSAConfig, training: bool) -> Tensor:
    x = dropped(x, cfg, training)
    dh, h = project(x, params["lora_dA"]), project(x, params["lora_A0"])
    B0, dB = params["lora_B0"].to(dh.dtype), params["lora_dB"].to(dh.dtype)
    if cfg.scale != 1.0:
        dh, h = dh * cfg.scale, h * cfg.scale
    h = h + dh
    return F.linear(h, dB).add_(F.linear(dh, B0)).to(y.dtype).add_(y)


@hookimpl
def fingerprint(layer: nn.Module) -> Tensor:
    return sketch(layer)
