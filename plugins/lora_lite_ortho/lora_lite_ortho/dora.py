"""DoRA: LoRA for the direction of each row of the weight, and a trainable magnitude for each row.

    W' = m ⊙ V / ‖V‖,   V = W + s · B A,   ‖·‖ per output row,   m = ‖W‖ (1 + δ),   s = alpha / r
    y = k ⊙ (W x + s · B A x) + b,   k = (1 + δ) ‖W‖ / ‖V‖

A (r, d_in) starts as U(±1/√d_in), B (d_out, r) and δ (d_out) as zeros. Identity at step 0 because B = 0 makes ‖V‖
the very number ‖W‖, so that k is 1. The norm is taken anew at every call and carries no gradient (section 4.3 of the
paper), without the dense weight: ‖V‖² = ‖W‖² + 2 s Σ B ⊙ (W Aᵀ) + s² Σ B ⊙ (B A Aᵀ), where W Aᵀ is the frozen layer
run on the r rows of A. With dropout, y = W x + b + (k − 1) ⊙ W x̃ + s k ⊙ B A x̃ in training, x̃ being the part of x
that is left: one more run of the frozen layer. Needs the row norms of the base, which are made at attach and not saved.
r (d_in + d_out) + d_out parameters, r (d_in + d_out) multiply-accumulates per token and r d_in d_out per call.

Liu, Wang, Yin, Molchanov, Wang, Cheng, Chen: DoRA, 2024 (ICML), arXiv:2402.09353.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lite_core import DropoutConfig, ParamSpec, base_forward, dense_weight, dropped, hookimpl, layer_dtype, project

from . import _peft_norms
from ._gates import gated


@dataclass(frozen=True, kw_only=True)
class DoRAConfig(DropoutConfig):
    """Config of DoRA."""

    variant = "dora"


Config = DoRAConfig
to_peft, from_peft = hookimpl(_peft_norms.dora_to_peft), hookimpl(_peft_norms.dora_from_peft)


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: DoRAConfig, layer: nn.Module) -> dict[str, ParamSpec]:
    full = torch.promote_types(layer_dtype(layer), torch.float32)
    return {
        "lora_A": ParamSpec((cfg.r, d_in), init="kaiming_uniform"),
        "lora_B": ParamSpec((d_out, cfg.r)),
        "lora_m": ParamSpec((d_out,), doc="relative offset δ of each row's magnitude"),
        "lora_w2": ParamSpec(
            (d_out,), as_buffer=True, persistent=False, dtype=full, doc="squared row norms of the base"
        ),
    }


@hookimpl
def init(layer: nn.Module, params: dict[str, Tensor]) -> None:
    params["lora_w2"].copy_(dense_weight(layer).to(params["lora_w2"].dtype).square().sum(1))


@torch.no_grad()
def _norm_ratio(layer: nn.Module, A: Tensor, B: Tensor, w2: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """‖W‖ / ‖V‖ per row."""
    bias = getattr(layer, "bias", None)
    image = base_forward(layer, A.to(dtype))
    image = image if bias is None else image - bias
    A, B = A.to(w2.dtype), B.to(w2.dtype)
    cross = (B * image.T.to(w2.dtype)).sum(1)
    square = (B * (B @ (A @ A.T))).sum(1)
    v2 = torch.maximum(w2 + 2 * scale * cross + scale * scale * square, 1e-6 * w2)
    return w2.sqrt() / v2.sqrt().clamp_min(torch.finfo(w2.dtype).tiny)


@hookimpl
def forward(
    x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: DoRAConfig, layer: nn.Module, training: bool
) -> Tensor:
    A, B, m, w2 = params["lora_A"], params["lora_B"], params["lora_m"], params["lora_w2"]
    ratio = _norm_ratio(layer, A, B, w2, cfg.scale, x.dtype if x.is_floating_point() else y.dtype)
    k = (1 + m.to(ratio.dtype)) * ratio
    bias = getattr(layer, "bias", None)
    seen = dropped(x, cfg, training)
    hidden = project(seen, A)
    if seen is not x:
        product = base_forward(layer, seen)
        product = product if bias is None else product - bias
        delta = F.linear(hidden, (cfg.scale * k[:, None] * B).to(hidden.dtype)).to(y.dtype)
        return y + torch.addcmul(delta, product, (k - 1).to(y.dtype))
    unbias = None if bias is None else ((1 - k) * bias).to(hidden.dtype)  # k ⊙ y has the bias in it
    delta = F.linear(hidden, (cfg.scale * k[:, None] * B).to(hidden.dtype), unbias).to(y.dtype)
    return delta.add_(gated(y, k))
