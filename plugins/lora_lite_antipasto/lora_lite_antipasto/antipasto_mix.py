"""AntiPaSTO mixing core: singular values are scaled, and singular coordinates mixed by a low-rank matrix.

    W' = W + U [ diag(S ⊙ ELU(g)) + B A ] P,   y = W x + b + U [ S ⊙ ELU(g) ⊙ h + B (A h) ],   h = P x

U (d_out, r), S (r) and P (r, d_in) are frozen: r singular triplets of the weight, or of the weight on the calibration
data, as `basis` says (`lora-lite inspect antipasto_gain` has the formulas). Trained are g (r) and B (r, k), which start
as zeros, hence the identity at step 0, and A (k, r), which starts as U(±1/√r). The gain cannot turn a singular value's
sign; what is mixed is added, and not multiplied by S. Reads the dense weight at attach; a file only fits the weights it
was made on. r + 2 r k parameters, r (d_in + d_out) + 2 r k multiply-accumulates per token.

Clark: AntiPaSTO, 2026, arXiv:2601.07473, with a diagonal plus low-rank core (its "dplr" form) and an untouched base
weight. Bases: Yang, Li, Zhou, Song, Wu, Nie, Ghanem: CorDA, 2024, arXiv:2406.05223; Yuan et al.: ASVD, 2023,
arXiv:2312.05821.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lite_core import ConfigError, ParamSpec, RankConfig, Target, hookimpl, lowrank_delta, project, sketch

from . import _bases

BENCH = {"lr": 1e-2}


@dataclass(frozen=True, kw_only=True)
class AntiPaSTOMixConfig(RankConfig):
    """Config of the mixing core.

    r      number of singular triplets
    k      rank of what mixes them, at least 1
    basis  "svd", or with calibration data "corda" or "asvd"
    power  exponent of the inputs' statistic: 0.5 (None) or 1 for corda, any up to 2 for asvd (None: 0.5). With 1, which
           gains take, h is large where inputs are small, and those coordinates alone are mixed
    """

    variant = "antipasto_mix"

    r: int = 256
    k: int = 8
    basis: str = "svd"
    power: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _bases.check_basis(self)
        if self.k < 1:
            raise ConfigError(f"AntiPaSTOMixConfig(k={self.k!r}): the mixing matrix has a rank of at least 1")


Config = AntiPaSTOMixConfig


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: AntiPaSTOMixConfig, name: str) -> dict[str, ParamSpec]:
    return {
        **_bases.basis_specs(d_in, d_out, cfg.r, name),
        "lora_g": ParamSpec((cfg.r,), doc="a singular value is scaled by 1 + ELU(g)"),
        "lora_A": ParamSpec((cfg.k, cfg.r), init="kaiming_uniform"),
        "lora_B": ParamSpec((cfg.r, cfg.k)),
    }


@hookimpl
def init(layer: nn.Module, params: dict[str, Tensor], cfg: Any, generator: torch.Generator) -> None:
    _bases.plain_basis(layer, params, cfg, generator)


@hookimpl
def group_init(model: nn.Module, targets: tuple[Target, ...], cfg: Any, calibration_data: Any) -> None:
    _bases.oriented_bases(model, targets, cfg, calibration_data, power=0.5)


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor]) -> Tensor:
    h = project(x, params["lora_P"])
    S, g = params["lora_S"].to(h.dtype), params["lora_g"].to(h.dtype)
    change = torch.addcmul(lowrank_delta(h, params["lora_A"], params["lora_B"]), S * F.elu(g), h)
    return F.linear(change, params["lora_U"].to(h.dtype)).to(y.dtype).add_(y)


@hookimpl
def fingerprint(layer: nn.Module) -> Tensor:
    return sketch(layer)
