"""What an adapter costs: added multiply-accumulates, time, memory. All measured on the model, nothing typed in."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import lora_lite_core as ll


@torch.no_grad()
def added_macs_per_token(model: nn.Module, tokens: int = 32) -> float:
    """Multiply-accumulates of matrix products that the adapters add per token: the slope between `tokens` and twice as
    many, so that costs per step do not count, minus the same with the adapters off. Elementwise work is not counted."""

    def macs(count: int) -> float:
        ids = torch.zeros(1, count, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, use_cache=False)
        return counter.get_total_flops() / 2

    adapted = macs(2 * tokens) - macs(tokens)
    with ll.disabled(model):
        frozen = macs(2 * tokens) - macs(tokens)
    return (adapted - frozen) / tokens


def step_times(loss: Callable[[], Tensor], repeats: int = 12) -> tuple[float, float]:
    """Median milliseconds of a forward and of a backward pass; the first two of the repeats do not count."""
    forward, backward = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        value = loss()
        middle = time.perf_counter()
        value.backward()
        forward.append(middle - start)
        backward.append(time.perf_counter() - middle)
    return 1e3 * statistics.median(forward[2:]), 1e3 * statistics.median(backward[2:])


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of live tensor storages that come into being inside it; `peak` is the most at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {t.untyped_storage()._cdata for t in _tensors((args, kwargs or {}))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in inputs and key not in self._seen:
                self._seen.add(key)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
