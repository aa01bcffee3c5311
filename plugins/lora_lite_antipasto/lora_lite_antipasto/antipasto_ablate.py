"""AntiPaSTO ablation: learnt directions are taken out of a layer's output, partly or wholly, and nothing is amplified.

    y = W x + b − U Ĉ ( ᾱ ⊙ (Ĉᵀ z) ),   z = S ⊙ (P x),   Ĉ = orth(C),   ᾱ = α clamped to [0, 1]

U (d_out, r), S (r) and P (r, d_in) are frozen: r singular triplets of the weight, or of the weight on the calibration
data, as `basis` says (`lora-lite inspect antipasto_gain` has the formulas). Trained are C (r, k), which starts as
N(0, 1/r), and α (k), which starts as zeros, hence the identity at step 0. Ĉ has orthonormal columns (by QR), so that
the core's eigenvalues are 1 − ᾱ and 1: a contraction. C learns once an α is above zero; the one of a direction that
the task needs stays at zero. Beyond the ends the gradient of α loses the part that leads further out, and keeps the one
that leads back. Meant for layers that write to the residual stream: target_roles=("writer",). `ll.strength` above 1
leaves the range of contractions. Reads the dense weight at attach; a file only fits the weights it was made on.
r k + k parameters, r (d_in + d_out) + 2 r k multiply-accumulates per token.

Clark: AntiPaSTO, 2026, arXiv:2601.07473. Arditi, Obeso, Syed, Paleka, Panickssery, Gurnee, Nanda: Refusal in Language
Models Is Mediated by a Single Direction, 2024, arXiv:2406.11717 (one direction of activations, out of all writers).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lite_core import ConfigError, ParamSpec, RankConfig, Target, TargetError, hookimpl, project, sketch

from . import _bases
from ._boundary import clamp_01

BENCH = {"lr": 1e-1}


@dataclass(frozen=True, kw_only=True)
class AntiPaSTOAblateConfig(RankConfig):
    """Config of the ablation.

    r      number of singular triplets
    k      number of directions, from 1 to r
    basis  "svd", or with calibration data "corda" or "asvd"
    power  exponent of the inputs' statistic: 1 (None) or 0.5 for corda, any up to 2 for asvd (None: 0.5)
    """

    variant = "antipasto_ablate"

    r: int = 256
    k: int = 4
    basis: str = "svd"
    power: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _bases.check_basis(self)
        if self.k < 1:
            raise ConfigError(f"AntiPaSTOAblateConfig(k={self.k!r}): give the number of directions, at least 1")


Config = AntiPaSTOAblateConfig


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: AntiPaSTOAblateConfig, name: str) -> dict[str, ParamSpec]:
    if cfg.k > cfg.r:
        raise TargetError(f"{name}: k={cfg.k} directions in r={cfg.r} singular coordinates; k is at most {cfg.r}")

    def draw(C: Tensor, generator: torch.Generator) -> None:
        C.normal_(std=cfg.r**-0.5, generator=generator)

    return {
        **_bases.basis_specs(d_in, d_out, cfg.r, name),
        "lora_C": ParamSpec((cfg.r, cfg.k), draw, doc="directions, made orthonormal at every call"),
        "lora_a": ParamSpec((cfg.k,), doc="share α of each direction that is taken out"),
    }


@hookimpl
def init(layer: nn.Module, params: dict[str, Tensor], cfg: Any, generator: torch.Generator) -> None:
    _bases.plain_basis(layer, params, cfg, generator)


@hookimpl
def group_init(model: nn.Module, targets: tuple[Target, ...], cfg: Any, calibration_data: Any) -> None:
    _bases.oriented_bases(model, targets, cfg, calibration_data)


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor]) -> Tensor:
    h = project(x, params["lora_P"])
    C = params["lora_C"].to(torch.promote_types(h.dtype, torch.float32))
    directions = torch.linalg.qr(C).Q.to(h.dtype)
    z = params["lora_S"].to(h.dtype) * h
    taken = F.linear(-clamp_01(params["lora_a"]).to(h.dtype) * F.linear(z, directions.T), directions)
    return F.linear(taken, params["lora_U"].to(h.dtype)).to(y.dtype).add_(y)


@hookimpl
def fingerprint(layer: nn.Module) -> Tensor:
    return sketch(layer)
