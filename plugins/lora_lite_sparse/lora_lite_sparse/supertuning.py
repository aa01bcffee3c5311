"""Super-Tuning: the entries of the weight with the largest magnitude are trained.

    y = W x + b + ΔW x + s · B (A x),    s = alpha / r  (r = 0: without the product)

ΔW is zero but where |W| is among the (1 − sparsity) d_in d_out largest of the layer. Its entries and B (d_out, r) start
as zeros, which makes step 0 the identity, A (r, d_in) as U(±1/√d_in). Which entries they are is saved, 8 bytes each,
and a file fits the weights it was made on. Reads the dense weight once, at attach; entries of one size (of a quantised
base) are chosen by their place. One multiply-accumulate per entry and token on a processor in float32, else d_in d_out;
r (d_in + d_out) more with r.

Supra-Tuning: Combining Outlier and Low-Rank Adaptation for Sparse and Efficient LLM Fine-Tuning, 2025, OpenReview
FFIn2TH7aU. Super-Tuning, 2026, arXiv:2607.09287 (as the peft package has it).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lite_core import (
    AdapterConfig,
    ConfigError,
    ParamSpec,
    TargetError,
    dense_weight,
    hookimpl,
    lowrank_delta,
    sketch,
    sparse_delta,
)

from . import _peft

BENCH = {"lr": 5e-2}
LAYERS = ("linear", "convolution", "experts")


@dataclass(frozen=True, kw_only=True)
class SupertuningConfig(AdapterConfig):
    """Config of Super-Tuning.

    sparsity  share of the entries that stay as they are, from 0 to below 1
    smallest  the entries with the smallest magnitude instead
    r         rank of a low-rank product beside them, the paper's Supra; 0 is none
    alpha     numerator of its scale alpha / r; None is r, so that the scale is 1
    """

    variant = "supertuning"
    sparsity: float = 0.99
    smallest: bool = False
    r: int = 0
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity < 1:
            raise ConfigError(f"SupertuningConfig(sparsity={self.sparsity!r}): a share from 0 to below 1")
        if self.r < 0 or (self.alpha is not None and not (self.r and 0 < self.alpha < float("inf"))):
            raise ConfigError(f"SupertuningConfig(r={self.r}, alpha={self.alpha}): r from 0, alpha above 0 beside it")


Config = SupertuningConfig
to_peft, from_peft = hookimpl(_peft.super_to_peft), hookimpl(_peft.super_from_peft)


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: SupertuningConfig) -> dict[str, ParamSpec]:
    count = int(d_in * d_out * (1 - cfg.sparsity))
    if count < 1:
        raise TargetError(
            f"SupertuningConfig(sparsity={cfg.sparsity}) on a layer {d_in} → {d_out} leaves no entry to train; "
            f"sparsity is at most {1 - 1 / (d_in * d_out):.6f}"
        )
    places = ParamSpec((count,), trainable=False, dtype=torch.int64, doc="row · d_in + column")
    entries = {"lora_places": places, "lora_values": ParamSpec((count,), doc="changes of these entries")}
    if not cfg.r:
        return entries
    return {**entries, "lora_A": ParamSpec((cfg.r, d_in), "kaiming_uniform"), "lora_B": ParamSpec((d_out, cfg.r))}


@hookimpl
def init(layer: nn.Module, params: dict[str, Tensor], cfg: SupertuningConfig) -> None:
    order = dense_weight(layer).abs().flatten().sort(descending=not cfg.smallest, stable=True).indices
    params["lora_places"].copy_(order[: len(params["lora_places"])].sort().values)


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: SupertuningConfig) -> Tensor:
    delta = sparse_delta(x, params["lora_places"], params["lora_values"], y.shape[-1])
    if cfg.r:
        delta = lowrank_delta(x, params["lora_A"], params["lora_B"], (cfg.alpha or cfg.r) / cfg.r).add_(delta)
    return delta.to(y.dtype).add_(y)


@hookimpl
def fingerprint(layer: nn.Module) -> Tensor:
    return sketch(layer)
