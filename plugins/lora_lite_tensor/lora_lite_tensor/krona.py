"""KronA: the change is a Kronecker product of two trained matrices.

    y = W x + b + s · (A ⊗ B) x

A (a1, a2) and B (b1, b2) with d_out = a1 b1 and d_in = a2 b2; a1 and a2 are chosen, or the divisors of the widths
that are nearest to their roots. The rank of a Kronecker product is the product of the ranks: there is no bottleneck.
A starts as LoRA's A, B as zeros, which makes step 0 the identity. Needs nothing of the base. a1 a2 + b1 b2
parameters. x is seen as a2 rows of b2 numbers and multiplied from both sides, A X Bᵀ: a2 b1 b2 + a1 a2 b1
multiply-accumulates per token.

Edalati, Tahaei, Kobyzev, Nia, Clark, Rezagholizadeh: KronA, 2022, arXiv:2212.10650; here its form beside the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_lite_core import AdapterConfig, ConfigError, ParamSpec, TargetError, hookimpl, project

BENCH = {"lr": 2e-2}


@dataclass(frozen=True, kw_only=True)
class KronAConfig(AdapterConfig):
    """Config of KronA.

    a1       rows of A; must divide the d_out of every target. None is the divisor nearest to its root from below
    a2       columns of A; must divide d_in. None as above
    scaling  s
    """

    variant = "krona"

    a1: int | None = None
    a2: int | None = None
    scaling: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, size in (("a1", self.a1), ("a2", self.a2)):
            if size is not None and (not isinstance(size, int) or size < 1):
                raise ConfigError(f"KronAConfig({name}={size!r}): a whole number of at least 1, or None")
        if not isinstance(self.scaling, (int, float)):
            raise ConfigError(f"KronAConfig(scaling={self.scaling!r}): a number")
        if not self.scaling:
            raise ConfigError(f"KronAConfig(scaling={self.scaling!r}): nothing would be trained; a number other than 0")


Config = KronAConfig


def _divisor(name: str, size: int | None, side: str, width: int) -> int:
    if size is None:
        return next(number for number in range(int(width**0.5), 0, -1) if width % number == 0)
    if width % size:
        fitting = [number for number in range(1, min(width, 512) + 1) if width % number == 0]
        raise TargetError(f"KronAConfig({name}={size}) does not divide {side}={width}; what does: {fitting}")
    return size


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: KronAConfig) -> dict[str, ParamSpec]:
    a1, a2 = _divisor("a1", cfg.a1, "d_out", d_out), _divisor("a2", cfg.a2, "d_in", d_in)
    return {"lora_A": ParamSpec((a1, a2), "kaiming_uniform"), "lora_B": ParamSpec((d_out // a1, d_in // a2))}


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: KronAConfig) -> Tensor:
    A, B = params["lora_A"] * cfg.scaling, params["lora_B"]
    if not x.is_floating_point():  # tokens of an embedding
        return y + project(x, torch.kron(A, B)).to(y.dtype)
    rows = F.linear(x.unflatten(-1, (A.shape[1], B.shape[1])), B.to(x.dtype))
    return torch.matmul(A.to(rows.dtype), rows).flatten(-2).to(y.dtype).add_(y)
