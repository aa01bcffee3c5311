"""CorDA: LoRA that starts from the components of the weight that matter most, or least, for given inputs.

    published   y = (W − s B0 A0) x + b + s · B (A x),   A and B starting at A0 and B0,   s = alpha / r
    here        y = W x + b + s · [ dB ((A0 + dA) x) + B0 (dA x) ],   A = A0 + dA,   B = B0 + dB
    start       W C = U S Vᵀ,   C = E[x xᵀ],   A0 = √(S/s) Vᵀ C⁻¹,   B0 = U √(S/s),   of r triplets

The two are equal, but here the weight is never written. mode "ipm" (instruction-previewed) takes the largest triplets:
the calibration data are of the task to be learnt. "kpm" (knowledge-preserved) takes the smallest: the data are of what
is to be kept, and what is learnt goes where they excite least. A0 (r, d_in) and B0 (d_out, r) are frozen, dA and dB
trained from zero, which makes step 0 the identity; dropout acts on what is learnt alone. C is not centred, padding is
left out, its mean diagonal is set to 1 (the size of the data plays no part) and 0.01 added to it, all in float64. Reads
the dense weight at attach; a file only fits its base. r (d_in + d_out) parameters, 2 r (d_in + d_out)
multiply-accumulates per token. In PEFT's folders it is written as a LoRA of rank 2r on the base as it is.

Yang, Li, Zhou, Song, Wu, Nie, Ghanem: CorDA: Context-Oriented Decomposition Adaptation of Large Language Models, 2024
(NeurIPS), arXiv:2406.05223.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite_core import (
    ConfigError,
    DropoutConfig,
    Moments,
    ParamSpec,
    Target,
    TargetError,
    calibration_batches,
    collect_inputs,
    dense_weight,
    dropped,
    hookimpl,
    lowrank_delta,
    sketch,
    truncated_svd,
)

from . import _peft_offsets

BENCH = {"lr": 2e-3}


@dataclass(frozen=True, kw_only=True)
class CorDAConfig(DropoutConfig):
    """Config of CorDA. alpha only scales what is learnt: s B0 A0 is the same for every alpha.

    mode  "ipm": learn where the calibration data, of the task, are strongest; "kpm": where those, to be kept, are not
    """

    variant = "corda"

    mode: str = "ipm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("ipm", "kpm"):
            raise ConfigError(f"CorDAConfig(mode={self.mode!r}): the modes are 'ipm' and 'kpm'")


Config = CorDAConfig
to_peft = hookimpl(_peft_offsets.to_peft)
fingerprint = hookimpl(lambda layer: sketch(layer))


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: CorDAConfig) -> dict[str, ParamSpec]:
    if cfg.r > min(d_in, d_out):
        raise TargetError(f"CorDAConfig(r={cfg.r}) on a layer {d_in} → {d_out}: r is at most {min(d_in, d_out)}")
    shapes = {"A0": (cfg.r, d_in), "B0": (d_out, cfg.r), "dA": (cfg.r, d_in), "dB": (d_out, cfg.r)}
    return {f"lora_{key}": ParamSpec(shape, trainable=key[0] == "d") for key, shape in shapes.items()}


@hookimpl
def group_init(model: nn.Module, targets: tuple[Target, ...], cfg: CorDAConfig, calibration_data: Any) -> None:
    batches = calibration_batches(calibration_data, "corda")
    moments = collect_inputs(model, targets, batches, lambda target: Moments(target.d_in), shared=True)
    for target in targets:
        C = moments[target.name].second_moment(center=False)
        C = C / C.diagonal().mean() + 0.01 * torch.eye(len(C), dtype=C.dtype)
        W = dense_weight(target.layer).to(C)
        U, S, Vh = truncated_svd(W @ C, target.cfg.r, torch.Generator().manual_seed(0), smallest=cfg.mode == "kpm")
        root = (S / target.cfg.scale).sqrt()
        target.params["lora_A0"].copy_(root[:, None] * torch.linalg.solve(C, Vh.T).T)
        target.params["lora_B0"].copy_(U * root)


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: CorDAConfig, training: bool) -> Tensor:
    A0, B0, dA, dB = (params[f"lora_{key}"] for key in ("A0", "B0", "dA", "dB"))
    A, B = torch.cat([A0 + dA, dA]), torch.cat([dB, B0], 1)  # both terms in one product
    return lowrank_delta(dropped(x, cfg, training), A, B, cfg.scale).to(y.dtype).add_(y)
