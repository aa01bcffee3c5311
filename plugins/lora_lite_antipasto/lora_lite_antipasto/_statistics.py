"""What the inputs of a layer are like, as a matrix or as one number for each input, of mean 1 and never quite zero."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_lite_core import Accumulator, CalibrationError, Moments

DAMPING = 0.01  # of the mean, added to every eigenvalue of the second moment and to every mean |x|


class SecondMoment(Moments):
    """C = E[x xᵀ] of all rows, not centred."""

    def scaling(self, power: float | None) -> Tensor:
        """C (d_in, d_in), or for power 0.5 its Cholesky factor: any square root gives the same triplets."""
        moment = self.second_moment(center=False)
        C = moment / moment.diagonal().mean() + DAMPING * torch.eye(len(moment), dtype=moment.dtype)
        return torch.linalg.cholesky(C) if power == 0.5 else C


class Sizes(Accumulator):
    """mean |x| of each input."""

    def __init__(self, d_in: int) -> None:
        super().__init__()
        self.total = torch.zeros(d_in, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        self.count += len(rows)
        self.total += rows.abs().sum(0, dtype=torch.float64).cpu()

    def scaling(self, power: float | None) -> Tensor:
        """A power of it, (d_in,)."""
        sizes = self.total / max(self.count, 1)
        if not sizes.any():
            raise CalibrationError(
                f"{self.name}: all inputs in the calibration data are zero; give batches that the layer does see"
            )
        return (sizes / sizes.mean() + DAMPING) ** (0.5 if power is None else power)


def statistic(d_in: int, whole: bool) -> SecondMoment | Sizes:
    return SecondMoment(d_in) if whole else Sizes(d_in)
