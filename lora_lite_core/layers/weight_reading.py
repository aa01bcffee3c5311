"""Reading a base layer: its frozen forward and its dense weight, by running a twin where it cannot be looked at."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .four_bit_packing import unpack
from .layer_kinds import is_conv1d, is_plain, layer_device, layer_dtype, sizes_of, storage_of
from .twins import Twins

PROBE_ROWS = 256  # identity rows per block when a weight is probed


def base_forward(layer: nn.Module, x: Tensor) -> Tensor:
    """The frozen layer alone, without any hook: x (..., d_in) → (..., d_out), bias included."""
    forward: Callable[[Tensor], Tensor] = layer.forward
    return forward(x)


def dense_weight(layer: nn.Module) -> Tensor:
    """The layer's weight as a (d_out, d_in) tensor that must not be written.

    The weight itself for a plain nn.Linear or Conv1D; every other linear-like layer (4-bit, 8-bit, parametrised …) is
    probed: a twin of it, in eval mode and without its bias, is run on identity blocks. Exact, whatever the storage; the
    layer itself is not touched. Costs d_in rows through the layer.
    """
    if (weight := plain_weight(layer)) is not None:
        return weight
    d_in, d_out = sizes_of(layer)
    with probe(layer, bias=False) as (twin, zero):
        weight = zero.new_empty(d_out, d_in)
        at_zero = base_forward(twin, zero)
        for start in range(0, d_in, PROBE_ROWS):
            rows = zero.new_zeros(min(PROBE_ROWS, d_in - start), d_in)
            rows[:, start:].fill_diagonal_(1)
            weight[:, start : start + len(rows)] = (base_forward(twin, rows) - at_zero).T
    return weight


def bias_of(layer: nn.Module) -> Tensor:
    """What the frozen layer makes of zeros, (d_out,), in the dtype of `dense_weight`; zeros where it has no bias."""
    if is_plain(layer):
        bias: Tensor | None = getattr(layer, "bias", None)
        return layer.weight.new_zeros(layer.out_features) if bias is None else bias.detach()
    with probe(layer, bias=True) as (twin, zero):
        return base_forward(twin, zero)[0]


def plain_weight(layer: nn.Module) -> Tensor | None:
    """The weight as (d_out, d_in) where the layer is of a kind that can be looked at, else None."""
    weight: Any = layer.weight if is_plain(layer) or is_conv1d(layer) else None
    if weight is None:
        return None
    return weight.detach() if is_plain(layer) else weight.detach().T


@contextmanager
def probe(layer: nn.Module, *, bias: bool) -> Generator[tuple[nn.Module, Tensor]]:
    """A twin to run, and a row of zeros (1, d_in) of the device and dtype to run it in.

    In eval mode, without gradients and autocast. Without `bias`, zeros are in its place (Conv1D needs one), so that
    weight plus bias is not rounded.
    """
    twins = Twins()
    twin = twins.of(layer)
    unpack(twin)
    own: Tensor | None = twin._parameters.get("bias")
    if own is not None and not bias:
        twin._parameters["bias"] = nn.Parameter(torch.zeros_like(own), requires_grad=False)
    device = layer_device(layer)
    with within(torch.no_grad(), torch.autocast(device.type, enabled=False), twins.kept_apart()):
        yield twin, torch.zeros(1, sizes_of(layer)[0], dtype=probe_dtype(layer), device=device)


def probe_dtype(layer: nn.Module) -> torch.dtype:
    """Float32 for bitsandbytes layers, which take any and are rough in others; else what the layer is in."""
    return torch.float32 if storage_of(layer).startswith("bnb") else layer_dtype(layer)


@contextmanager
def within(*contexts: AbstractContextManager[object]) -> Generator[None]:
    """These contexts, left even when an interrupt comes while they are being left."""
    stack = ExitStack()
    try:
        try:
            for context in contexts:
                stack.enter_context(context)
            yield
        finally:
            stack.close()
    finally:
        stack.close()
