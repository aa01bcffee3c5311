"""LoRA-FA: LoRA with A frozen, and for B the gradient that comes nearest to the one of the whole weight.

    y = W x + b + s · B (A x),    g_B ← g_B (A Aᵀ)⁻¹ / s²,    s = alpha / r

A (r, d_in) starts as U(±1/√d_in) and is frozen, B (d_out, r) starts as zeros, which makes step 0 the identity, and is
trained. The gradient is rewritten before every step of an optimizer that `ll.follow` was given (without that line it
is a plain LoRA with a frozen A): a step along g_B changes the weight by s g_B A, and of all such changes the rewritten
one is nearest to the gradient of the weight. Optimizers that normalise gradients, as Adam does, see its directions.
Needs nothing of the base, and keeps r numbers per token for backward where LoRA keeps d_in. r d_out parameters, r
(d_in + d_out) multiply-accumulates per token, r² (d_in + d_out) per step.

Zhang, Zhang, Shi, Chu, Li: LoRA-FA: Memory-efficient Low-rank Adaptation, 2023, arXiv:2308.03303; the gradient is that
of its third version, 2025. The peft package has it as an optimizer, create_lorafa_optimizer; its folders are LoRA's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lite_core import DropoutConfig, ParamSpec, Target, dropped, hookimpl, lowrank_delta

BENCH = {"lr": 2e-2}
EPS = 1e-8  # on the diagonal of A Aᵀ, as in the peft package


@dataclass(frozen=True, kw_only=True)
class LoRAFAConfig(DropoutConfig):
    """Config of LoRA-FA."""

    variant = "lora_fa"


Config = LoRAFAConfig


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: LoRAFAConfig) -> dict[str, ParamSpec]:
    return {
        "lora_A": ParamSpec((cfg.r, d_in), "kaiming_uniform", trainable=False, doc="directions in the input"),
        "lora_B": ParamSpec((d_out, cfg.r), doc="what each direction adds to the output"),
    }


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: LoRAFAConfig, training: bool) -> Tensor:
    x = dropped(x, cfg, training)
    return lowrank_delta(x, params["lora_A"], params["lora_B"], cfg.scale).to(y.dtype).add_(y)


@hookimpl
def before_step(targets: Sequence[Target]) -> None:
    for target in targets:
        A, gradient, scale = target.params["lora_A"].double(), target.params["lora_B"].grad, target.cfg.scale
        if gradient is not None:  # of a layer that took part in the step
            gram = A @ A.T + EPS * torch.eye(len(A), dtype=A.dtype, device=A.device)
            gradient.copy_(torch.linalg.solve(gram, gradient.double(), left=False) / scale**2)
