"""SVFT: the weight's singular vectors are mixed by a trained diagonal, or a band beside it.

    W' = U (S + M) Vh,   M_ij = 0 where |i − j| > off_diagonal        here   y = W x + b + U (M (Vh x))

U (d_out, r) and Vh (r, d_in) are the singular vectors of W, frozen: all of them, r = min(d_in, d_out), or the r first.
The entries of M, those of the diagonal first, then of each diagonal beside it, are trained from zero, which makes step
0 the identity (the authors' code draws them, and gates them by a sigmoid). off_diagonal=0 is SVFT-P, larger ones are
SVFT-B. Entries that are not on the diagonal belong to the signs of the vectors, so that these are saved: with all of
them a file is larger than the layer's weight, and r is the way to a smaller one. Reads the base's dense weight once, at
attach; a file only fits the weights it was made on. r + 2 Σ (r − k) parameters, k up to off_diagonal; r (d_in + d_out +
2 off_diagonal + 1) multiply-accumulates per token.

Lingam, Tejaswi, Vavre, Shetty, Gudur, Ghosh, Dimakis, Choi, Bojchevski, Sanghavi: SVFT: Parameter-Efficient Fine-Tuning
with Singular Vectors, 2024 (NeurIPS), arXiv:2405.19597.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lite_core import AdapterConfig, ConfigError, ParamSpec, TargetError, hookimpl, project, sketch

from ._triplets import singular_triplets

BENCH = {"lr": 5e-2}


@dataclass(frozen=True, kw_only=True)
class SVFTConfig(AdapterConfig):
    """Config of SVFT.

    off_diagonal  diagonals on either side of the main one; 0 is the plain form
    r             number of singular vectors, None for all
    """

    variant = "svft"

    off_diagonal: int = 0
    r: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("off_diagonal", 0), ("r", 1)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
            if not whole and (name, value) != ("r", None):
                raise ConfigError(f"SVFTConfig({name}={value!r}): give a whole number of at least {least}")


Config = SVFTConfig


def _lengths(r: int, cfg: SVFTConfig) -> list[int]:
    """Of the main diagonal, and of each pair beside it, the upper one first."""
    return [r, *(r - k for k in range(1, cfg.off_diagonal + 1) for _ in range(2))]


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: SVFTConfig) -> dict[str, ParamSpec]:
    r = cfg.r or min(d_in, d_out)
    if not cfg.off_diagonal < r <= min(d_in, d_out):
        raise TargetError(
            f"SVFTConfig(r={cfg.r}, off_diagonal={cfg.off_diagonal}) on a layer {d_in} → {d_out}: r is at most "
            f"{min(d_in, d_out)} and off_diagonal below r"
        )
    return {
        "lora_U": ParamSpec((d_out, r), trainable=False),
        "lora_Vh": ParamSpec((r, d_in), trainable=False),
        "lora_m": ParamSpec((sum(_lengths(r, cfg)),), doc="entries of M, diagonal by diagonal"),
    }


@hookimpl
def init(layer: nn.Module, params: dict[str, Tensor], name: str, generator: torch.Generator) -> None:
    U, _, Vh = singular_triplets(layer, len(params["lora_Vh"]), name, generator)
    params["lora_U"].copy_(U)
    params["lora_Vh"].copy_(Vh)


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: SVFTConfig) -> Tensor:
    h = project(x, params["lora_Vh"])
    r = h.shape[-1]
    main, *others = params["lora_m"].to(h.dtype).split(_lengths(r, cfg))
    mixed = main * h
    for k, (upper, lower) in enumerate(zip(others[::2], others[1::2], strict=True), 1):
        mixed = mixed + F.pad(upper * h[..., k:], (0, k)) + F.pad(lower * h[..., : r - k], (k, 0))
    return F.linear(mixed, params["lora_U"].to(h.dtype)).to(y.dtype).add_(y)


@hookimpl
def fingerprint(layer: nn.Module) -> Tensor:
    return sketch(layer)
