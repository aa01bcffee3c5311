"""LoRA-GA: LoRA that starts in the directions in which the first step of full fine-tuning would go.

    published   y = (W − s B0 A0) x + b + s · B (A x),   A and B starting at A0 and B0,   s = alpha / r
    here        y = W x + b + s · [ dB ((A0 + dA) x) + B0 (dA x) ],   A = A0 + dA,   B = B0 + dB
    start       ∂ loss / ∂ W = U S Vᵀ,   A0 = ζ V[:, :r]ᵀ,   B0 = ζ U[:, r:2r],   ζ = d_out^¼ / √γ

The two are equal, but here the weight is never written. A0 (r, d_in) and B0 (d_out, r) are frozen, dA and dB trained
from zero, which makes step 0 the identity; dropout acts on what is learnt alone. The gradient is the mean over the
calibration batches; its loss is the model's own where batches hold labels, else that of the next token of `input_ids`,
padding left out, else the mean square of the output. Reads nothing of the weight itself, but the directions are those
of this base: a file fits no other. r (d_in + d_out) parameters, 2 r (d_in + d_out) multiply-accumulates per token. In
PEFT's folders it is written as a LoRA of rank 2r on the base as it is, which is what PEFT's own conversion makes.

Wang, Yu, Li: LoRA-GA: Low-Rank Adaptation with Gradient Approximation, 2024 (NeurIPS), arXiv:2407.05000.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite_core import (
    ConfigError,
    DropoutConfig,
    ParamSpec,
    Target,
    TargetError,
    dropped,
    hookimpl,
    lowrank_delta,
    sketch,
    truncated_svd,
)

from . import _peft_offsets
from ._first_gradient import first_gradients

BENCH = {"lr": 5e-3}


@dataclass(frozen=True, kw_only=True)
class LoRAGAConfig(DropoutConfig):
    """Config of LoRA-GA.

    gamma  γ of ζ: the larger, the smaller A0 and B0 are
    """

    variant = "lora_ga"

    gamma: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gamma > 0:
            raise ConfigError(f"LoRAGAConfig(gamma={self.gamma!r}): gamma is a number above 0")


Config = LoRAGAConfig
to_peft = hookimpl(_peft_offsets.to_peft)
fingerprint = hookimpl(lambda layer: sketch(layer))


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: LoRAGAConfig) -> dict[str, ParamSpec]:
    if 2 * cfg.r > (least := min(d_in, d_out)):
        raise TargetError(f"LoRAGAConfig(r={cfg.r}) on a layer {d_in} → {d_out}: r is at most {least // 2}")
    shapes = {"A0": (cfg.r, d_in), "B0": (d_out, cfg.r), "dA": (cfg.r, d_in), "dB": (d_out, cfg.r)}
    return {f"lora_{key}": ParamSpec(shape, trainable=key[0] == "d") for key, shape in shapes.items()}


@hookimpl
def group_init(model: nn.Module, targets: tuple[Target, ...], cfg: LoRAGAConfig, calibration_data: Any) -> None:
    gradients = first_gradients(model, targets, calibration_data, "lora_ga")
    for target in targets:
        r, zeta = target.cfg.r, target.d_out**0.25 / cfg.gamma**0.5
        U, _, Vh = truncated_svd(gradients[target.name], 2 * r, torch.Generator().manual_seed(0))
        target.params["lora_A0"].copy_(zeta * Vh[:r])
        target.params["lora_B0"].copy_(zeta * U[:, r:])


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: LoRAGAConfig, training: bool) -> Tensor:
    A0, B0, dA, dB = (params[f"lora_{key}"] for key in ("A0", "B0", "dA", "dB"))
    A, B = torch.cat([A0 + dA, dA]), torch.cat([dB, B0], 1)  # both terms in one product
    return lowrank_delta(dropped(x, cfg, training), A, B, cfg.scale).to(y.dtype).add_(y)
