"""LoKr: the change is a Kronecker product of a small matrix and a larger one.

    y = W x + b + s · (w1 ⊗ w2) x,   s = alpha / r

w1 (a, c) and w2 (b, d) with d_out = a b and d_in = c d: the widths are split as near to their roots as they divide, or
by decompose_factor. w2 is a product w2_a w2_b of rank r, unless r is at least half of its larger side: then it is
trained as it is. With decompose_both this holds of w1, too. w2 (or w2_b) starts as zeros, which makes step 0 the
identity, the others as LoRA's A; this is LyCORIS' start. (PEFT's default starts with w1 = 0. Elsewhere, where the two
differ, it is PEFT's way: LyCORIS leaves s out where w1 and w2 are both whole, and gives w1 the smaller part of a width
even where the factor is the larger.) On a convolution d_in is the width of a patch, and with split="channels", as both
packages have it, c d are the input's channels and w2 is (b, d · kernel). Needs nothing of the base. a c + r (b + d)
parameters, or a c + b d. x is seen as c rows of d numbers and multiplied from both sides, w1 X w2ᵀ, so that the
Kronecker product is never made: c d b + a c b multiply-accumulates per token, and r b d per call where w2 is a product.

Yeh, Hsieh, Gao, Yang, Oh, Gong: Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation,
2023 (ICLR 2024), arXiv:2309.14859.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lite_core import ConfigError, LowRankConfig, ParamSpec, hookimpl, project

from . import _peft
from ._widths import kernel_of, pair

BENCH = {"lr": 2e-2}
SPLITS = ("patches", "channels", "swapped")


@dataclass(frozen=True, kw_only=True)
class LoKrConfig(LowRankConfig):
    """Config of LoKr.

    decompose_both    w1 is a product of rank r, too, where that is smaller
    decompose_factor  a and c, the first part of both widths; -1, and what does not divide one, is the nearest divisor
                      to its root from below, and at most the factor
    split             of a convolution: "patches", their width; "channels"; or "swapped", channels with w2 ⊗ w1 in the
                      place of w1 ⊗ w2, which PEFT computes on nn.Conv1d where w2 is whole
    """

    variant = "lokr"

    decompose_both: bool = False
    decompose_factor: int = -1
    split: str = "patches"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.decompose_factor, int) or (self.decompose_factor < 1 and self.decompose_factor != -1):
            raise ConfigError(f"LoKrConfig(decompose_factor={self.decompose_factor!r}): a whole number from 1, or -1")
        if self.split not in SPLITS:
            raise ConfigError(f"LoKrConfig(split={self.split!r}): give one of {', '.join(map(repr, SPLITS))}")


Config = LoKrConfig
to_peft, from_peft = hookimpl(_peft.lokr_to_peft), hookimpl(_peft.lokr_from_peft)


def _part(name: str, rows: int, columns: int, r: int, *, whole: bool, zero: bool) -> dict[str, ParamSpec]:
    last = "zeros" if zero else "kaiming_uniform"
    if whole:
        return {f"lora_{name}": ParamSpec((rows, columns), last)}
    return {f"lora_{name}_a": ParamSpec((rows, r), "kaiming_uniform"), f"lora_{name}_b": ParamSpec((r, columns), last)}


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: LoKrConfig, layer: nn.Module) -> dict[str, ParamSpec]:
    kernel = 1 if cfg.split == "patches" else kernel_of(layer)
    (a, b), (c, d) = pair(d_out, cfg.decompose_factor), pair(d_in // kernel, cfg.decompose_factor)
    small = not cfg.decompose_both or 2 * cfg.r >= max(a, c)
    first = _part("w1", a, c, cfg.r, whole=small, zero=False)
    return first | _part("w2", b, d * kernel, cfg.r, whole=2 * cfg.r >= max(b, d), zero=True)


def _whole(params: dict[str, Tensor], name: str) -> Tensor:
    return params[name] if name in params else params[f"{name}_a"] @ params[f"{name}_b"]


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: LoKrConfig, layer: nn.Module) -> Tensor:
    w1, w2 = _whole(params, "lora_w1") * cfg.scale, _whole(params, "lora_w2")
    swapped = cfg.split == "swapped"
    if not x.is_floating_point():  # tokens of an embedding
        return y + project(x, torch.kron(*((w2, w1) if swapped else (w1, w2)))).to(y.dtype)
    if swapped:  # (d, c, kernel)
        rows = x.unflatten(-1, (-1, w1.shape[1], kernel_of(layer))).transpose(-3, -2).flatten(-2)
    else:
        rows = x.unflatten(-1, (w1.shape[1], w2.shape[1]))
    rows = F.linear(rows, w2.to(x.dtype))
    change = torch.matmul(w1.to(rows.dtype), rows)
    return (change.mT if swapped else change).flatten(-2).to(y.dtype).add_(y)
