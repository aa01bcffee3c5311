"""TinyLoRA: LoRA-XS whose small matrix is a trained sum of a few fixed random ones; as few as one number is trained.

    y = W x + b + B (Σ_i v_i P_i) A x,   A = √S Vh (r, d_in),   B = U √S (d_out, r),   i < u

U, S, Vh are the r largest singular triplets of W; they and the u matrices P_i (r, r), drawn from N(0, 1/r) for each
layer, are frozen. v (u) is trained: one for each layer, or with tied=True one for the whole model. Identity at step 0
because v is zero; its gradient is alive from the start. Reads the base's dense weight once, at attach; a file only fits
the weights it was made on. u parameters a layer, or u in all; r (d_in + d_out) multiply-accumulates per token and r² (u
+ d_in) per call.

Morris, Mireshghallah, Ibrahim, Mahloujifar: Learning to Reason in 13 Parameters, 2026, arXiv:2602.04118; the random P
and the halves of S, √S on each side, as in the peft package.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lite_core import (
    ConfigError,
    ParamSpec,
    RankConfig,
    TargetError,
    dense_weight,
    hookimpl,
    lowrank_delta,
    sketch,
    truncated_svd,
)

from . import _peft_tinylora

BENCH = {"lr": 3e-2}


@dataclass(frozen=True, kw_only=True)
class TinyLoRAConfig(RankConfig):
    """Config of TinyLoRA.

    u     how many numbers v has
    tied  one v for all layers, not one for each
    """

    variant = "tinylora"

    r: int = 2
    u: int = 64
    tied: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.u, bool) or not isinstance(self.u, int) or self.u < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"TinyLoRAConfig(u={self.u!r}): v has a whole number of entries, at least 1")


Config = TinyLoRAConfig
to_peft, from_peft = hookimpl(_peft_tinylora.tinylora_to_peft), hookimpl(_peft_tinylora.tinylora_from_peft)


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: TinyLoRAConfig) -> dict[str, ParamSpec]:
    if cfg.r > min(d_in, d_out):
        raise TargetError(f"TinyLoRAConfig(r={cfg.r}) on a layer {d_in} → {d_out}: r is at most {min(d_in, d_out)}")
    return {
        "lora_A": ParamSpec((cfg.r, d_in), trainable=False, doc="√S Vh of the r largest singular triplets"),
        "lora_B": ParamSpec((d_out, cfg.r), trainable=False, doc="U √S"),
        "lora_P": ParamSpec((cfg.u, cfg.r, cfg.r), lambda t, g: t.normal_(std=cfg.r**-0.5, generator=g), False),
        "lora_v": ParamSpec((cfg.u,), shared="v" if cfg.tied else ""),
    }


@hookimpl
def init(layer: nn.Module, params: dict[str, Tensor], cfg: TinyLoRAConfig, generator: torch.Generator) -> None:
    U, S, Vh = truncated_svd(dense_weight(layer), cfg.r, generator)
    params["lora_A"].copy_(S.sqrt()[:, None] * Vh)
    params["lora_B"].copy_(U * S.sqrt())


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor]) -> Tensor:
    R = torch.tensordot(params["lora_v"], params["lora_P"], 1)
    return lowrank_delta(x, R @ params["lora_A"], params["lora_B"]).to(y.dtype).add_(y)


@hookimpl
def fingerprint(layer: nn.Module) -> Tensor:
    return sketch(layer)
