"""LoKr: the change is a Kronecker product of a small matrix and a larger one.

    y = W x + b + s · (w1 ⊗ w2) x,   s = alpha / r

w1 (a, c) and w2 (b, d) with d_out = a b and d_in = c d: the widths are split as near to their roots as they divide, or
by decompose_factor. w2 is a product w2_a w2_b of rank r, unless r is at least half of its larger side: then it is
trained as it is. With decompose_both this holds of w1, too. w2 (or w2_b) starts as zeros, which makes step 0 the
identity, the others as LoRA's A; this is LyCORIS' start. (PEFT's default starts with w1 = 0. Elsewhere, where the two
differ, it is PEFT's way: LyCORIS leaves s out where w1 and w2 are both whole, and gives w1 the smaller part of a width
even where the factor is the larger. On a convolution both split the channels, here it is the width of a patch.) Needs
nothing of the base. a c + r (b + d) parameters, or a c + b d. x is seen as c rows of d numbers and multiplied from both
sides, w1 X w2ᵀ, so that the Kronecker product is never made: c d b + a c b multiply-accumulates per token, and r b d
per call where w2 is a product.

Yeh, Hsieh, Gao, Yang, Oh, Gong: Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation,
2023 (ICLR 2024), arXiv:2309.14859.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_lite_core import ConfigError, LowRankConfig, ParamSpec, hookimpl, project

from . import _peft

BENCH = {"lr": 2e-2}


@dataclass(frozen=True, kw_only=True)
class LoKrConfig(LowRankConfig):
    """Config of LoKr.

    decompose_both    w1 is a product of rank r, too, where that is smaller
    decompose_factor  a and c, the first part of both widths; -1, and what does not divide one, is the nearest divisor
                      to its root from below, and at most the factor
    """

    variant = "lokr"

    decompose_both: bool = False
    decompose_factor: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.decompose_factor, int) or (self.decompose_factor < 1 and self.decompose_factor != -1):
            raise ConfigError(f"LoKrConfig(decompose_factor={self.decompose_factor!r}): a whole number from 1, or -1")


Config = LoKrConfig
to_peft, from_peft = hookimpl(_peft.lokr_to_peft), hookimpl(_peft.lokr_from_peft)


def _split(width: int, factor: int) -> tuple[int, int]:
    """Two numbers with this product."""
    if factor > 0 and width % factor == 0:
        return factor, width // factor
    most = min(int(width**0.5), factor if factor > 0 else width)
    small = next(number for number in range(most, 0, -1) if width % number == 0)
    return small, width // small


def _part(name: str, rows: int, columns: int, r: int, *, whole: bool, zero: bool) -> dict[str, ParamSpec]:
    last = "zeros" if zero else "kaiming_uniform"
    if whole:
        return {f"lora_{name}": ParamSpec((rows, columns), last)}
    return {f"lora_{name}_a": ParamSpec((rows, r), "kaiming_uniform"), f"lora_{name}_b": ParamSpec((r, columns), last)}


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: LoKrConfig) -> dict[str, ParamSpec]:
    (a, b), (c, d) = _split(d_out, cfg.decompose_factor), _split(d_in, cfg.decompose_factor)
    small = not cfg.decompose_both or 2 * cfg.r >= max(a, c)
    first = _part("w1", a, c, cfg.r, whole=small, zero=False)
    return first | _part("w2", b, d, cfg.r, whole=2 * cfg.r >= max(b, d), zero=True)


def _whole(params: dict[str, Tensor], name: str) -> Tensor:
    return params[name] if name in params else params[f"{name}_a"] @ params[f"{name}_b"]


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: LoKrConfig) -> Tensor:
    w1, w2 = _whole(params, "lora_w1") * cfg.scale, _whole(params, "lora_w2")
    if not x.is_floating_point():  # tokens of an embedding
        return y + project(x, torch.kron(w1, w2)).to(y.dtype)
    rows = F.linear(x.unflatten(-1, (w1.shape[1], w2.shape[1])), w2.to(x.dtype))
    return torch.matmul(w1.to(rows.dtype), rows).flatten(-2).to(y.dtype).add_(y)
