"""Batches as large as memory allows: what does not fit goes through the model in halves."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


class AtOnce:
    """How many examples go through a model together. `size` is halved whenever the device runs out of memory, and stays
    so: what did not fit once is not tried again."""

    def __init__(self, size: int) -> None:
        self.size = max(1, size)

    def attempt(self, work: Callable[[int], T], undo: Callable[[], None] = lambda: None) -> T:
        """work(size), again with half the size where memory is not enough, after `undo()`. Raises the device's error
        where one example is too much."""
        while True:
            try:
                return work(self.size)
            except RuntimeError as error:
                if self.size == 1 or not ran_out(error):
                    raise
            undo()  # here, where the error no longer holds the tensors of what failed
            free()
            self.size //= 2


def ran_out(error: RuntimeError) -> bool:
    """Whether a device had not enough memory: by accelerate's list of messages, where that is installed."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    try:
        from accelerate.utils.memory import should_reduce_batch_size  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        return False
    return bool(should_reduce_batch_size(error))


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
