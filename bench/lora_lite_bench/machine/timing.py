"""Contestants timed side by side in one process: what slows the machine for a while slows all alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch

WARM_UP = 2  # rounds that do not count
Sample = tuple[float, float]  # seconds: by the clock (or by CUDA events), of the processor
Action = Callable[[], object]


def timed(action: Action, device: str) -> Sample:
    if torch.device(device).type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        cpu = time.process_time()
        start.record()
        action()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3, time.process_time() - cpu
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - cpu


def interleave(
    prepare: Mapping[str, Callable[[], Action]],
    rounds: int,
    device: str,
    advance: Action = lambda: None,
    warm_up: int = WARM_UP,
) -> dict[str, list[Sample]]:
    """Each round calls every `prepare`, untimed, and times what it gives, in random order."""
    rng = random.Random(0)
    order = list(prepare)
    samples: dict[str, list[Sample]] = {name: [] for name in order}
    for number in range(rounds + warm_up):
        rng.shuffle(order)
        for name in order:
            sample = timed(prepare[name](), device)
            if number >= warm_up:
                samples[name].append(sample)
            advance()
    return samples


def counted(device: str) -> int:
    """Which number of a sample counts: 0, CUDA's events; 1, the processor's time."""
    return 0 if torch.device(device).type == "cuda" else 1


def ratio(first: list[Sample], second: list[Sample], which: int) -> float:
    """Median over the rounds of first / second; which: 0 clock, 1 processor."""
    return statistics.median(a[which] / b[which] for a, b in zip(first, second, strict=True))


def milliseconds(samples: list[Sample], which: int) -> float:
    return 1e3 * statistics.median(sample[which] for sample in samples)
