"""Calibration data for `group_init`: checked, and run through the model whatever form its batches have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .errors import CalibrationError


def calibration_batches(data: Iterable[Any] | None, variant: str) -> Iterable[Any]:
    """The data as something that can be read again and again, at least one batch long.

    Raises CalibrationError when there is none, or when it is an iterator that is used up after one pass.
    """
    if data is None:
        raise CalibrationError(f"variant '{variant}' needs calibration data; give attach(…, calibration_data=batches)")
    if isinstance(data, Iterator):
        raise CalibrationError(
            f"variant '{variant}' reads its calibration data more than once, and this {type(data).__name__} is used up "
            "after one pass; give a list or a DataLoader"
        )
    if next(iter(data), None) is None:
        raise CalibrationError(f"variant '{variant}' got calibration data without a single batch")
    return data


@torch.no_grad()
def run_batch(model: nn.Module, batch: Any) -> None:
    """One forward pass on a batch: a dict is keyword arguments, a tuple or list positional ones, else one argument."""
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)
