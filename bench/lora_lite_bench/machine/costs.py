"""What an adapter costs: added multiply-accumulates, time, memory. All measured on the model, nothing typed in."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import lora_lite_core as ll


@torch.no_grad()
def added_macs_per_token(model: nn.Module, inputs: dict[str, Tensor]) -> float:
    """Multiply-accumulates of matrix products that the adapters add per token, a row that an adapted layer sees: the
    difference between one example and two, so that costs per step do not count, minus the same with the adapters off.
    Elementwise work is not counted. `inputs` are of two examples or more, all of one length."""
    model.eval()
    rows: list[int] = []
    layers = [target.layer for target in ll.adapters(model)["default"].layers().values()]
    watch = [
        layer.register_forward_pre_hook(lambda layer, args: rows.append(args[0][..., 0].numel())) for layer in layers
    ]

    def macs(count: int) -> float:
        rows.clear()
        with FlopCounterMode(display=False) as counter:
            model(**{name: tensor[:count] for name, tensor in inputs.items()})
        return counter.get_total_flops() / 2

    try:
        macs(1)  # what is made once and kept, rotations say, is no cost of a token
        adapted = macs(2) - macs(1)
        tokens = max(rows)
        with ll.disabled(model):
            frozen = macs(2) - macs(1)
    finally:
        for handle in watch:
            handle.remove()
    return (adapted - frozen) / tokens


def step_times(losses: Sequence[Callable[[], Tensor]], repeats: int = 12) -> list[tuple[float, float]]:
    """Median milliseconds of a forward and of a backward pass of each, in turn; the first two rounds do not count."""
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in losses]
    for _ in range(repeats):
        for loss, (forward, backward) in zip(losses, times, strict=True):
            start = _now()
            value = loss()
            middle = _now()
            value.backward()
            forward.append(middle - start)
            backward.append(_now() - middle)
    return [(1e3 * statistics.median(f[2:]), 1e3 * statistics.median(b[2:])) for f, b in times]


def _now() -> float:
    """Seconds, when the GPU has done what it was told, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of live tensor storages that come into being inside it; `peak` is the most at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {storage._cdata for t in _tensors((args, kwargs or {})) for storage in _storages(t)}
        result = func(*args, **(kwargs or {}))
        for storage in [storage for tensor in _tensors(result) for storage in _storages(tensor)]:
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


def _storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """One, or those of a sparse tensor's parts."""
    if tensor.layout == torch.strided:
        return [tensor.untyped_storage()]
    if tensor.layout == torch.sparse_coo:
        return [part.untyped_storage() for part in (tensor._indices(), tensor._values())]
    if tensor.layout == torch.sparse_csr:
        return [part.untyped_storage() for part in (tensor.crow_indices(), tensor.col_indices(), tensor.values())]
    raise NotImplementedError(f"the memory of {tensor.layout} tensors is not counted here")
