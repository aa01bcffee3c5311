"""Reading a base layer: its frozen forward and its dense weight."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .kinds import is_plain, layer_device, layer_dtype, sizes_of, storage_of

PROBE_ROWS = 256  # identity rows per block when a weight is probed


def base_forward(layer: nn.Module, x: Tensor) -> Tensor:
    """The frozen layer alone, without any hook: x (..., d_in) → (..., d_out), bias included."""
    forward: Callable[[Tensor], Tensor] = layer.forward
    return forward(x)


def dense_weight(layer: nn.Module) -> Tensor:
    """The layer's weight as a (d_out, d_in) tensor that must not be written.

    The weight itself for a plain nn.Linear; for every other linear-like layer (Conv1D, 4-bit, 8-bit …) it is probed
    with identity blocks, its bias out of the way: exact, whatever the storage. Costs d_in rows through the layer.
    """
    if is_plain(layer):
        return layer.weight.detach()
    d_in, d_out = sizes_of(layer)
    dtype, device = _probe_dtype(layer), layer_device(layer)
    weight = torch.empty(d_out, d_in, dtype=dtype, device=device)
    with _probing(layer):
        at_zero = base_forward(layer, torch.zeros(1, d_in, dtype=dtype, device=device))
        for start in range(0, d_in, PROBE_ROWS):
            rows = torch.zeros(min(PROBE_ROWS, d_in - start), d_in, dtype=dtype, device=device)
            rows[:, start:].fill_diagonal_(1)
            weight[:, start : start + len(rows)] = (base_forward(layer, rows) - at_zero).T
    return weight


@contextmanager
def _probing(layer: nn.Module) -> Generator[None]:
    """No gradients, no autocast, zeros in the bias' place (Conv1D needs one) so that weight plus bias is not rounded.

    What bitsandbytes notes down at a first forward is put back as it was.
    """
    bias = layer._parameters.get("bias")
    notes = {name: vars(layer)[name] for name in ("compute_dtype", "compute_type_is_set") if name in vars(layer)}
    try:
        if bias is not None:
            layer._parameters["bias"] = nn.Parameter(torch.zeros_like(bias), requires_grad=False)
        with torch.no_grad(), torch.autocast(layer_device(layer).type, enabled=False):
            yield
    finally:
        if bias is not None:
            layer._parameters["bias"] = bias
        vars(layer).update(notes)


def _probe_dtype(layer: nn.Module) -> torch.dtype:
    """Float32 for bitsandbytes layers, which take any and are rough in others; else what the layer is in."""
    return torch.float32 if storage_of(layer).startswith("bnb") else layer_dtype(layer)
