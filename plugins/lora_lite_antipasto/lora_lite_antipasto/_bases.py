"""Singular bases of a base layer for the variants of this package: of its weight, or of its weight on data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lite_core import (
    CalibrationError,
    ConfigError,
    ParamSpec,
    Target,
    TargetError,
    calibration_batches,
    collect_inputs,
    dense_weight,
    truncated_svd,
)

from ._statistics import statistic

BASES = ("svd", "corda", "asvd")


def check_basis(cfg: Any) -> None:
    """Raise ConfigError for an unknown basis, and for a power that it has not."""
    name, basis, power = type(cfg).__name__, cfg.basis, cfg.power
    if basis not in BASES:
        raise ConfigError(f"{name}(basis={basis!r}): give one of {', '.join(BASES)}")
    if basis == "svd" and power is not None:
        raise ConfigError(f"{name}(power={power!r}): basis='svd' has no statistic; leave it None")
    if basis == "corda" and power not in (None, 0.5, 1):
        raise ConfigError(f"{name}(power={power!r}): basis='corda' takes 1 (as published) or 0.5 of the second moment")
    if basis == "asvd" and power is not None and not 0 < power <= 2:
        raise ConfigError(f"{name}(power={power!r}): basis='asvd' takes a power above 0 and at most 2")


def basis_specs(d_in: int, d_out: int, r: int, name: str) -> dict[str, ParamSpec]:
    """Room for U, S and P; TargetError when the layer has fewer than r singular values."""
    if r > min(d_in, d_out):
        raise TargetError(
            f"{name} has {min(d_in, d_out)} singular values and cannot have r={r}; lower r or use rank_pattern"
        )
    return {
        "lora_U": ParamSpec((d_out, r), trainable=False, doc="orthonormal output directions"),
        "lora_S": ParamSpec((r,), trainable=False, doc="singular values"),
        "lora_P": ParamSpec((r, d_in), trainable=False, doc="input directions: U diag(S) P is a part of the weight"),
    }


def plain_basis(layer: nn.Module, params: dict[str, Tensor], cfg: Any, generator: torch.Generator) -> None:
    """The weight's own largest triplets; nothing for the bases that need data, which `oriented_bases` fills."""
    if cfg.basis == "svd":
        _fill(params, truncated_svd(dense_weight(layer), cfg.r, generator))


def oriented_bases(
    model: nn.Module, targets: tuple[Target, ...], cfg: Any, calibration_data: Any, power: float | None = None
) -> None:
    """U diag(S) Pᵀ of W T, with T a root or power of what the inputs are like, and P T⁻¹ in place of P. `power` is that
    of a config without one; None is the statistic's own."""
    if cfg.basis == "svd":
        if calibration_data is not None:
            raise CalibrationError(
                "basis='svd' looks at the weight alone; leave calibration_data out, or basis='corda' or 'asvd'"
            )
        return
    batches, whole = calibration_batches(calibration_data, cfg.variant), cfg.basis == "corda"
    found = collect_inputs(model, targets, batches, lambda target: statistic(target.d_in, whole), shared=True)
    scalings: dict[int, Tensor] = {}  # one for layers that share their statistics
    for target in targets:
        seen = found[target.name]
        if id(seen) not in scalings:
            scalings[id(seen)] = seen.scaling(power if cfg.power is None else cfg.power)
        T, weight = scalings[id(seen)], dense_weight(target.layer).double()
        T = T.to(weight.device)
        U, S, Vh = truncated_svd(weight @ T if whole else weight * T, target.cfg.r, torch.Generator())
        P = torch.linalg.solve(T, Vh, left=False) if whole else Vh / T
        _fill(target.params, (U, S, P))


def _fill(params: dict[str, Tensor], triplets: tuple[Tensor, Tensor, Tensor]) -> None:
    for name, value in zip(("lora_U", "lora_S", "lora_P"), triplets, strict=True):
        params[name].copy_(value)
