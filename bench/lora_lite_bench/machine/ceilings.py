"""What the machine can do at most: operations of a matrix product, bytes moved. Measured, for a floor under timings."""

from __future__ import annotations

import time
from functools import cache, partial

import torch

from .timing import Action, counted, timed

SIDE = {"cpu": 1536, "cuda": 8192}  # of the square product whose operations are counted
PATIENCE = 0.2  # seconds for one ceiling; the best of all repetitions counts


@cache
def operations_per_second(device: str, dtype: torch.dtype) -> float:
    """Of a large square matrix product, a multiply-accumulate being two, with the threads that torch has."""
    side = SIDE["cuda" if device.startswith("cuda") else "cpu"]
    a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _best(lambda: a @ b, device)


@cache
def bytes_per_second(device: str, size: int) -> float:
    """Of a copy between two tensors that have `size` bytes together: what fits a cache is moved faster."""
    source, target = (torch.ones(max(1, size // 8), device=device) for _ in range(2))
    return 8 * len(source) / _best(lambda: target.copy_(source), device)


def floor_seconds(device: str, dtype: torch.dtype, operations: float, moved: float) -> float:
    """No program that does these operations on this many bytes is faster on this machine.

    Bytes are rounded up to a power of two for the measurement of their ceiling.
    """
    power = 1 << max(12, int(moved).bit_length())
    return max(operations / operations_per_second(device, dtype), moved / bytes_per_second(device, power))


def _best(action: Action, device: str) -> float:
    """The shortest of many repetitions, in seconds: by CUDA events, or of the processor."""
    best, end, many = float("inf"), time.perf_counter() + PATIENCE, 1
    while time.perf_counter() < end:
        took = timed(partial(_repeat, action, many), device)[counted(device)]
        best = min(best, took / many)
        many = max(many, min(1000, int(1e-3 / max(took / many, 1e-7))))  # a millisecond at a time
    return best


def _repeat(action: Action, times: int) -> None:
    for _ in range(times):
        action()
