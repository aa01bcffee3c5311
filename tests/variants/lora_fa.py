"""LoRA-FA: LoRA with A frozen, and the gradient of B the one that is nearest to the full fine-tuning's.

    y = W x + b + s · B A x,   g_B ← g_B (A Aᵀ)⁻¹ / s²

A (r, d_in) is frozen, B (d_out, r) starts as zeros (the identity). The projection is done before every step.

Zhang, Zhang, Shi, Chu, Li: LoRA-FA, 2023, arXiv:2308.03303; the projected gradient: version 3, 2025, theorem 3.
"""

from dataclasses import dataclass

import torch

from lora_lite_core import LowRankConfig, ParamSpec, hookimpl, lowrank_delta

BENCH = {"lr": 1e-2}


@dataclass(frozen=True, kw_only=True)
class LoRAFAConfig(LowRankConfig):
    variant = "lora_fa"


Config = LoRAFAConfig


@hookimpl
def param_specs(d_in, d_out, cfg):
    return {"lora_A": ParamSpec((cfg.r, d_in), "kaiming_uniform", trainable=False), "lora_B": ParamSpec((d_out, cfg.r))}


@hookimpl
def forward(x, y, params, cfg):
    return y + lowrank_delta(x, params["lora_A"], params["lora_B"], cfg.scale).to(y.dtype)


@hookimpl
def before_step(targets):
    for target in targets:
        A, B = target.params["lora_A"].double(), target.params["lora_B"]
        gram = A @ A.T + 1e-9 * torch.eye(len(A), dtype=A.dtype, device=A.device)
        B.grad.copy_(torch.linalg.solve(gram, B.grad.double().T).T / target.cfg.scale**2)
