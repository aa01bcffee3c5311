"""Compacter: bottleneck adapters after a block, whose matrices are sums of Kronecker products.

    h ← h + U gelu(D h + b_D) + b_U,   D = Σ_i A_i ⊗ (s_i t_iᵀ),   i = 1 … n   (U likewise)

D (r, d) and U (d, r) are made of n small matrices A_i (n, n), which all layers share (the slow weights), and, for
each of them, of a matrix of rank 1 of the layer's own (the fast ones): s_i (r/n), t_i (d/n) of D, s_i (d/n), t_i
(r/n) of U. All are trained. U's s_i and the biases start as zeros, which makes step 0 the identity; the rest is
random, D's entries as large as 1/√d. Needs nothing of the base; n must divide r and d. 3 d + 3 r parameters a layer
and n³ for all. 2 n r d multiply-accumulates per call, 2 r d per token.

Karimi Mahabadi, Henderson, Ruder: Compacter, 2021 (NeurIPS), arXiv:2106.04647.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_lite_core import ConfigError, ParamSpec, RankConfig, TargetError, hookimpl

LAYERS = ("block",)
AFFINE = False
BENCH = {"lr": 2e-2}


@dataclass(frozen=True, kw_only=True)
class CompacterConfig(RankConfig):
    """Config of Compacter; r is the width of the bottleneck.

    n  how many products are added, and the size of the shared matrices; must divide r and the blocks' width
    """

    variant = "compacter"

    n: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.n, int) or self.n < 1:
            raise ConfigError(f"CompacterConfig(n={self.n!r}): a whole number of at least 1")


Config = CompacterConfig


@hookimpl
def param_specs(d_out: int, cfg: CompacterConfig) -> dict[str, ParamSpec]:
    n, r = cfg.n, cfg.r
    if r % n or d_out % n:
        fitting = [number for number in range(1, min(r, d_out) + 1) if r % number == d_out % number == 0]
        raise TargetError(f"CompacterConfig(n={n}, r={r}) on a block of width {d_out}: n may be one of {fitting}")

    def normal(variance: float, *shape: int, shared: str = "") -> ParamSpec:
        def fill(tensor: Tensor, generator: torch.Generator) -> None:
            tensor.normal_(std=variance**0.5, generator=generator)

        return ParamSpec(shape, fill, shared=shared)

    return {
        "lora_A": normal(1 / n, n, n, n, shared="phm"),
        "lora_D_s": normal(1, n, r // n),
        "lora_D_t": normal(1 / d_out, n, d_out // n),
        "lora_D_bias": ParamSpec((r,)),
        "lora_U_s": ParamSpec((n, d_out // n)),
        "lora_U_t": normal(1, n, r // n),
        "lora_U_bias": ParamSpec((d_out,)),
    }


def _layer(x: Tensor, params: dict[str, Tensor], side: str) -> Tensor:
    A, s, t, bias = (params[name] for name in ("lora_A", f"lora_{side}_s", f"lora_{side}_t", f"lora_{side}_bias"))
    weight = torch.einsum("iab,ip,iq->apbq", A, s, t).flatten(0, 1).flatten(1)
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


@hookimpl
def forward(y: Tensor, params: dict[str, Tensor]) -> Tensor:
    return y + _layer(F.gelu(_layer(y, params, "D")), params, "U").to(y.dtype)
