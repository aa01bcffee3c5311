"""HRA: the input goes through a chain of trainable Householder reflections.

    y = W (R x) + b,   R = H₁ H₂ … H_r,   Hᵢ = I − 2 ûᵢ ûᵢᵀ,   û = u / ‖u‖

U (r, d_in), r even, starts as U(±√(2/r)) with its rows equal in pairs: reflections undo each other, which makes step 0
the identity up to rounding. Computed in compact WY form, R = I − Ûᵀ M⁻¹ Û with M the upper triangle of Û Ûᵀ and ½ on
its diagonal; r × r algebra in float32. Needs nothing of the base. Directions are scale free but optimizers are not: U
keeps the published norm, and below a learning rate of 1e-3 it wants float32 (the default). r · d_in parameters,
2 r d_in + r² multiply-accumulates per token.

Yuan, Liu, Xu: Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation, 2024
(NeurIPS), arXiv:2405.17484. The input-sided form of the paper. Its regulariser, orthogonality · ‖I − Û Ûᵀ‖_F a
layer, is what `ll.penalty` adds; it is not zero at the paired start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_lite_core import ConfigError, ParamSpec, RankConfig, TargetError, hookimpl

from . import _peft

IDENTITY_ATOL = 1e-5
IDENTITY_REASON = "pairs of reflections cancel only up to rounding: about one unit in the last place of float32"


@dataclass(frozen=True, kw_only=True)
class HRAConfig(RankConfig):
    """Config of HRA; r is the number of reflections, an even one.

    orthogonality  weight of the regulariser, 0 for none; 1e-4 in the authors' code
    """

    variant = "hra"

    orthogonality: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.orthogonality, (int, float)) or not self.orthogonality >= 0:
            raise ConfigError(f"HRAConfig(orthogonality={self.orthogonality!r}): a weight is a number from 0")
        for r in (self.r, *self.rank_pattern.values()):
            if r % 2:
                raise ConfigError(f"HRAConfig(r={r}): reflections start in pairs, so r must be even; use {r + 1}")


Config = HRAConfig
to_peft, from_peft = hookimpl(_peft.hra_to_peft), hookimpl(_peft.hra_from_peft)


def _paired(tensor: Tensor, generator: torch.Generator) -> None:
    r, d_in = tensor.shape
    bound = math.sqrt(2 / r)
    first, second = tensor.view(r // 2, 2, d_in).unbind(1)
    second.copy_(first.uniform_(-bound, bound, generator=generator))


@hookimpl
def param_specs(d_in: int, cfg: HRAConfig) -> dict[str, ParamSpec]:
    if d_in == 1:
        raise TargetError(
            "HRAConfig on a layer with d_in=1: one number has no directions; leave the layer out with exclude_names"
        )
    return {"lora_U": ParamSpec((cfg.r, d_in), init=_paired, doc="normals of the reflections")}


def _unit_rows(U: Tensor) -> Tensor:
    return U / U.norm(dim=-1, keepdim=True).clamp_min(1e-12)


@hookimpl
def forward_input(x: Tensor, params: dict[str, Tensor]) -> Tensor:
    full = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        U = _unit_rows(params["lora_U"].to(full))
        half = 0.5 * torch.eye(len(U), dtype=full, device=U.device)
        M = torch.triu(U @ U.T, 1) + half
        T = torch.linalg.solve_triangular(M, -2 * half, upper=True)  # −M⁻¹
        U = U.to(x.dtype)
        z = F.linear(F.linear(x, U).to(full), T)
        return (z.to(x.dtype) @ U).add_(x)


@hookimpl
def penalty(params: dict[str, Tensor], cfg: HRAConfig) -> Tensor:
    U = params["lora_U"]
    if not cfg.orthogonality:
        return U.new_zeros(())
    U = _unit_rows(U.to(torch.promote_types(U.dtype, torch.float32)))
    return cfg.orthogonality * torch.linalg.matrix_norm(torch.eye(len(U), dtype=U.dtype, device=U.device) - U @ U.T)
