"""LoRA-GA: LoRA that starts in the directions in which the first step of full fine-tuning would go.

    y = W x + b + s · [ (B₀ + dB)(A₀ + dA) − B₀ A₀ ] x,   s = alpha / r
    ∂ loss / ∂ W = U S Vᵀ (mean of the batches),   A₀ = ζ V[:, :r]ᵀ,   B₀ = ζ U[:, r:2r],   ζ = d_out^¼ / √γ

A₀ (r, d_in), B₀ (d_out, r) are frozen, dA and dB trained from zero: dB A₀ + (B₀ + dB) dA is zero at step 0 (the paper
changes W instead). A file fits its base alone. Without labels the loss is the next token's or, without input_ids, y².

Wang, Yu, Li: LoRA-GA: Low-Rank Adaptation with Gradient Approximation, 2024 (NeurIPS), arXiv:2407.05000.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

import lora_lite_core as ll

BENCH = {"lr": 5e-3}
fingerprint = ll.hookimpl(lambda layer: ll.sketch(layer))


@dataclass(frozen=True, kw_only=True)
class LoRAGAConfig(ll.LowRankConfig):
    variant = "lora_ga"
    gamma: float = 16.0


Config = LoRAGAConfig


@ll.hookimpl
def param_specs(d_in, d_out, cfg):
    if 2 * cfg.r > (least := min(d_in, d_out)):
        raise ll.TargetError(f"LoRAGAConfig(r={cfg.r}) on a layer {d_in} → {d_out}: r is at most {least // 2}")
    shapes = {"A0": (cfg.r, d_in), "B0": (d_out, cfg.r), "dA": (cfg.r, d_in), "dB": (d_out, cfg.r)}
    return {f"lora_{key}": ll.ParamSpec(shape, trainable=key[0] == "d") for key, shape in shapes.items()}


@ll.hookimpl
def group_init(model, targets, calibration_data):
    gradients = ll.collect_gradients(model, targets, ll.calibration_batches(calibration_data, "lora_ga"), loss=loss_of)
    for target in targets:
        r, zeta = target.cfg.r, target.d_out**0.25 / target.cfg.gamma**0.5
        U, _, Vh = torch.linalg.svd(gradients[target.name].double(), full_matrices=False)
        target.params["lora_A0"].copy_(zeta * Vh[:r])
        target.params["lora_B0"].copy_(zeta * U[:, r : 2 * r])


def loss_of(output, batch):
    loss, logits = getattr(output, "loss", None), getattr(output, "logits", output)
    if loss is None and isinstance(batch, dict) and "input_ids" in batch:
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["input_ids"][:, 1:].flatten())
    return logits.float().square().mean() if loss is None else loss


@ll.hookimpl
def forward(x, y, params, cfg):
    A0, B0, dA, dB = (params[f"lora_{key}"].to(x.dtype) for key in ("A0", "B0", "dA", "dB"))
    return y + ((F.linear(F.linear(x, A0), dB) + F.linear(F.linear(x, dA), B0 + dB)) * cfg.scale).to(y.dtype)
