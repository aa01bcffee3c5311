"""AntiPaSTO gain core: singular values are scaled, by a map that is never negative, and nothing is rotated.

    W' = W + U diag(S ⊙ ELU(g)) P,   y = W x + b + U [ S ⊙ ELU(g) ⊙ h ],   h = P x

so that a singular value is S e^g below g = 0 and S (1 + g) above: it cannot change its sign as 1 + g does, nor grow as
fast as e^g. U (d_out, r), S (r) and P (r, d_in) are frozen, g (r) is trained from zero, where ELU is exactly zero: the
identity at step 0, whatever the basis. `basis` says which r triplets:

    "svd"    U S P of W, the r largest: P = Vh
    "corda"  U S Vh of W C, P = Vh C⁻¹, C = E[x xᵀ] over the calibration data (power=0.5: of its square root)
    "asvd"   U S Vh of W D, P = Vh D⁻¹, D = diag(mean |x|)^½ (power: another one)

C and mean |x| are scaled to a mean of 1 and 0.01 is added to what C has on its diagonal, and to mean |x|. Reads the
dense weight at attach; a file only fits the weights it was made on. `ll.strength` multiplies the change, not g. r
parameters, r (d_in + d_out) multiply-accumulates per token.

Clark: AntiPaSTO, 2026, arXiv:2601.07473, in the form without rotations and with an untouched base weight. Bases: Yang,
Li, Zhou, Song, Wu, Nie, Ghanem: CorDA, 2024, arXiv:2406.05223; Yuan et al.: ASVD, 2023, arXiv:2312.05821.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lite_core import ParamSpec, RankConfig, Target, hookimpl, project, sketch

from . import _bases

BENCH = {"lr": 1e-1}


@dataclass(frozen=True, kw_only=True)
class AntiPaSTOGainConfig(RankConfig):
    """Config of the gain core.

    r      number of singular triplets
    basis  "svd", or with calibration data "corda" or "asvd"
    power  exponent of the inputs' statistic: 1 (None) or 0.5 for corda, any up to 2 for asvd (None: 0.5)
    """

    variant = "antipasto_gain"

    r: int = 256
    basis: str = "svd"
    power: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _bases.check_basis(self)


Config = AntiPaSTOGainConfig


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: AntiPaSTOGainConfig, name: str) -> dict[str, ParamSpec]:
    return {
        **_bases.basis_specs(d_in, d_out, cfg.r, name),
        "lora_g": ParamSpec((cfg.r,), doc="a singular value is scaled by 1 + ELU(g)"),
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
    S, g = params["lora_S"].to(h.dtype), params["lora_g"].to(h.dtype)
    return F.linear(S * F.elu(g) * h, params["lora_U"].to(h.dtype)).to(y.dtype).add_(y)


@hookimpl
def fingerprint(layer: nn.Module) -> Tensor:
    return sketch(layer)
