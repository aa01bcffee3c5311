"""LoRA-SB: an r × r core between frozen factors that span the first step of full fine-tuning.

    y = W x + b + s · B R A x,   s = alpha / r
    − sign(∂ loss / ∂ W) = U S Vᵀ,   B = U[:, :r],   A = V[:, :r]ᵀ,   R starts as η S / s

B (d_out, r) and A (r, d_in) are frozen and orthonormal, R (r, r) is trained. −η sign(gradient) is Adam's first step
with the rate η; the authors start there, at its best approximation of rank r. By default η (`first_step`) is 0: R
starts as zeros and step 0 is the identity; R has a gradient all the same, s Bᵀ (∂ loss / ∂ W) Aᵀ. The gradient is the
mean over the calibration batches; its loss is the model's own where batches hold labels, else that of the next token of
`input_ids`, padding left out, else the mean square of the output. A file fits its base alone. r² parameters, r (d_in +
d_out + r) multiply-accumulates per token.

Ponkshe, Singhal, Gorbunov, Tumanov, Horvath, Vepakomma: Initialization using Update Approximation is a Silver Bullet
for Extremely Efficient Low-Rank Fine-Tuning, 2024, arXiv:2411.19557.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lite_core import (
    ConfigError,
    DropoutConfig,
    ParamSpec,
    Target,
    TargetError,
    dropped,
    hookimpl,
    project,
    sketch,
    truncated_svd,
)

from ._first_gradient import first_gradients

BENCH = {"lr": 2e-2}


@dataclass(frozen=True, kw_only=True)
class LoRASBConfig(DropoutConfig):
    """Config of LoRA-SB.

    first_step  η of the step that R starts with, as a learning rate of full fine-tuning; 0 starts as the identity
    """

    variant = "lora_sb"

    first_step: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.first_step >= 0:
            raise ConfigError(f"LoRASBConfig(first_step={self.first_step!r}): a learning rate is a number from 0")


Config = LoRASBConfig
fingerprint = hookimpl(lambda layer: sketch(layer))


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: LoRASBConfig) -> dict[str, ParamSpec]:
    if cfg.r > min(d_in, d_out):
        raise TargetError(f"LoRASBConfig(r={cfg.r}) on a layer {d_in} → {d_out}: r is at most {min(d_in, d_out)}")
    return {
        "lora_A": ParamSpec((cfg.r, d_in), trainable=False, doc="right singular vectors of the first step"),
        "lora_B": ParamSpec((d_out, cfg.r), trainable=False, doc="left singular vectors of the first step"),
        "lora_R": ParamSpec((cfg.r, cfg.r), doc="the core"),
    }


@hookimpl
def group_init(model: nn.Module, targets: tuple[Target, ...], cfg: LoRASBConfig, calibration_data: Any) -> None:
    gradients = first_gradients(model, targets, calibration_data, "lora_sb")
    for target in targets:
        step, r = -gradients[target.name].sign(), target.cfg.r
        U, S, Vh = truncated_svd(step, r, torch.Generator().manual_seed(0))
        target.params["lora_A"].copy_(Vh)
        target.params["lora_B"].copy_(U)
        target.params["lora_R"].copy_(torch.diag(cfg.first_step / target.cfg.scale * S))


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: LoRASBConfig, training: bool) -> Tensor:
    h = project(dropped(x, cfg, training), params["lora_A"])
    R, B = (params[name].to(h.dtype) for name in ("lora_R", "lora_B"))
    return F.linear(F.linear(cfg.scale * h, R), B).to(y.dtype).add_(y)
