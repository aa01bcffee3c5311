"""GraLoRA: a low-rank product of its own for each of the k × k blocks of the weight.

    y_j = (W x + b)_j + s · Σ_i B_ji A_ij x_i  (+ s · (B' A' x)_j),    i, j = 1 … k,    s = alpha / (r + hybrid_r)

x_i is the i-th of k equal parts of the input, y_j of the output; A_ij (r/k, d_in/k) and B_ji (d_out/k, r/k). lora_A
(r, d_in) holds A_ij in its i-th block of columns and its j-th block of rows, and starts as U(±1/√(d_in/k)). lora_B
(d_out, r) holds B_ji in its j-th block of rows and its i-th block of columns, and starts as zeros, which makes step 0
the identity. Both are trained. The rank is up to k r, with the parameters of a LoRA of rank r. With hybrid_r there is
a LoRA A' (hybrid_r, d_in), B' (d_out, hybrid_r) beside. Needs nothing of the base; k divides r, d_in and d_out. (r +
hybrid_r)(d_in + d_out) parameters and as many multiply-accumulates per token.

Jung, Ahn, Kim, Kim, Park: GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning, 2025 (NeurIPS),
arXiv:2505.20355.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lite_core import ConfigError, DropoutConfig, ParamSpec, TargetError, dropped, hookimpl, lowrank_delta

from . import _peft_blocks

LAYERS = ("linear", "convolution", "experts")
BENCH = {"lr": 1e-2}


@dataclass(frozen=True, kw_only=True)
class GraLoRAConfig(DropoutConfig):
    """Config of GraLoRA. Where alpha is None the scale is 1.

    k         blocks on each side; divides r and the d_in and d_out of every target. The paper takes 2, from r=64 on 4
    hybrid_r  rank of a plain LoRA beside; 0 is none
    """

    variant = "gralora"

    k: int = 2
    hybrid_r: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("k", 1), ("hybrid_r", 0)):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"GraLoRAConfig({name}={value!r}): it is a whole number of at least {least}")
        for r in (self.r, *self.rank_pattern.values()):
            if r % self.k:
                raise ConfigError(f"GraLoRAConfig(r={r}, k={self.k}): k must divide r; use r={r + self.k - r % self.k}")

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / (self.r + self.hybrid_r)


Config = GraLoRAConfig
to_peft, from_peft = hookimpl(_peft_blocks.gralora_to_peft), hookimpl(_peft_blocks.gralora_from_peft)


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: GraLoRAConfig) -> dict[str, ParamSpec]:
    if d_in % cfg.k or d_out % cfg.k:
        fitting = [k for k in range(1, 129) if math.gcd(d_in, d_out, cfg.r) % k == 0]
        raise TargetError(f"GraLoRAConfig(k={cfg.k}) on a layer {d_in} → {d_out}: {fitting} divide both and r={cfg.r}")

    def uniform(A: Tensor, generator: torch.Generator) -> None:
        bound = math.sqrt(cfg.k / d_in)
        A.uniform_(-bound, bound, generator=generator)

    specs = {"lora_A": ParamSpec((cfg.r, d_in), uniform), "lora_B": ParamSpec((d_out, cfg.r))}
    if cfg.hybrid_r:
        specs["lora_A_hybrid"] = ParamSpec((cfg.hybrid_r, d_in), "kaiming_uniform")
        specs["lora_B_hybrid"] = ParamSpec((d_out, cfg.hybrid_r))
    return specs


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: GraLoRAConfig, training: bool) -> Tensor:
    A, B = (params[name].to(x.dtype) for name in ("lora_A", "lora_B"))
    x, k = dropped(x, cfg, training), cfg.k
    hidden = torch.einsum("...ic,ric->...ir", x.unflatten(-1, (k, -1)), A.unflatten(1, (k, -1))) * cfg.scale
    mixed = hidden.unflatten(-1, (k, -1)).transpose(-3, -2).flatten(-2)  # from (i, j) to (j, i)
    change = torch.einsum("...jr,jor->...jo", mixed, B.unflatten(0, (k, -1)).to(mixed.dtype)).flatten(-2)
    if cfg.hybrid_r:
        change = change + lowrank_delta(x, params["lora_A_hybrid"], params["lora_B_hybrid"], cfg.scale)
    return change.to(y.dtype) + y
