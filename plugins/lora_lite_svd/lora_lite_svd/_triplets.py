"""Singular triplets of a base layer, for the variants of this package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lite_core import (
    Accumulator,
    CalibrationError,
    Moments,
    Target,
    TargetError,
    calibration_batches,
    collect_inputs,
    dense_weight,
    truncated_svd,
)


def singular_triplets(
    layer: nn.Module, r: int, name: str, generator: torch.Generator, *, smallest: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """U (d_out, r), S (r,), Vh (r, d_in) of the layer's weight, largest first; TargetError when r is too many."""
    weight = dense_weight(layer)
    if r > min(weight.shape):
        raise TargetError(
            f"{name} has {min(weight.shape)} singular values and cannot have r={r}; lower r or use rank_pattern"
        )
    return truncated_svd(weight, r, generator, smallest=smallest)


def copy_triplets(params: dict[str, Tensor], triplets: tuple[Tensor, Tensor, Tensor]) -> None:
    for name, value in zip(("lora_U", "lora_S", "lora_Vh"), triplets, strict=True):
        params[name].copy_(value)


class MeanAbsolute(Accumulator):
    """mean |v·x| for each row v of Vh."""

    def __init__(self, Vh: Tensor) -> None:
        super().__init__()
        self.Vh, self.total = Vh, torch.zeros(len(Vh), device=Vh.device)

    def add(self, rows: Tensor) -> None:
        self.count += len(rows)
        self.total += (rows @ self.Vh.T).abs().sum(0)


def select_triplets(model: nn.Module, targets: tuple[Target, ...], select: str, calibration_data: Any) -> None:
    """Replace each target's triplets by those of its whole SVD that its inputs excite most, in order of index.

    "s" leaves those of the largest singular values; "rms" and "mean_abs" need calibration data.
    """
    if select == "s":
        if calibration_data is not None:
            raise CalibrationError("select='s' looks at the weight alone; leave calibration_data out, or select='rms'")
        return
    batches = calibration_batches(calibration_data, "antipasto")
    whole = {}
    for target in targets:
        weight = dense_weight(target.layer).to(torch.promote_types(target.params["lora_S"].dtype, torch.float32))
        whole[target.name] = truncated_svd(weight, min(weight.shape), torch.Generator())
    if select == "rms":
        found = collect_inputs(model, targets, batches, lambda target: Moments(target.d_in), shared=True)
    else:
        found = collect_inputs(
            model, targets, batches, lambda target: MeanAbsolute(whole[target.name][2]), shared=False
        )
    for target in targets:
        U, S, Vh = whole[target.name]
        seen = found[target.name]
        if isinstance(seen, Moments):
            moment = seen.second_moment(center=False).to(Vh)
            excitation = ((Vh @ moment) * Vh).sum(1).clamp_min(0).sqrt()
        else:
            excitation = seen.total / seen.count
        if not excitation.max() > 0:
            raise CalibrationError(
                f"{target.name}: all inputs in the calibration data are zero; give batches that the layer does see"
            )
        kept = (S * excitation).topk(target.cfg.r).indices.sort().values
        copy_triplets(target.params, (U[:, kept], S[kept], Vh[kept]))
