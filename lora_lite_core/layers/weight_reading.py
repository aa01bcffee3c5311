"""Reading a base layer: its frozen forward and its dense weight, by running a twin where it cannot be looked at."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .four_bit_packing import read_bitsandbytes, unpack
from .kinds.convolution import flat_weight, is_convolution
from .kinds.embedding import is_embedding, is_table
from .kinds.layer_kinds import is_conv1d, is_plain, layer_device, layer_dtype, sizes_of, storage_of
from .twins import Twins

PROBE_ROWS = 256  # identity rows per block when a weight is probed


def base_forward(layer: nn.Module, x: Tensor) -> Tensor:
    """The frozen layer alone, without any hook: x (..., d_in) → (..., d_out), bias included; of a convolution x are
    patches, of an embedding rows (..., d_in) or token ids (...,)."""
    if is_convolution(layer):
        return nn.functional.linear(x, flat_weight(layer), layer.bias)
    if is_embedding(layer) and x.is_floating_point():
        return nn.functional.linear(x, dense_weight(layer))
    forward: Callable[[Tensor], Tensor] = layer.forward
    return forward(x)


def dense_weight(layer: nn.Module) -> Tensor:
    """The layer's weight as a (d_out, d_in) tensor that must not be written.

    The weight itself for a plain nn.Linear or Conv1D. What bitsandbytes, torchao, HQQ and quanto store is unpacked by
    their own functions, once these have given the same as probing for a layer of that kind in this process: cheap
    enough for every forward pass. Every other linear-like layer (parametrised, of a class of its own) is probed: a twin
    of it, in eval mode and without its bias, is run on identity blocks, which costs d_in rows through it. Exact,
    whatever the storage; the layer itself is not touched. In `forward`, where it is multiplied by something trained,
    one dense weight a layer is kept for backward.
    """
    if (weight := plain_weight(layer)) is not None:
        return weight
    if (weight := _unpacked(layer)) is not None:
        return weight
    return _probed(layer)


def _probed(layer: nn.Module) -> Tensor:
    d_in, d_out = sizes_of(layer)
    with probe(layer, bias=False) as (twin, zero):
        if is_embedding(layer):
            return base_forward(twin, torch.arange(d_in, device=zero.device)).T
        weight = zero.new_empty(d_out, d_in)
        at_zero = base_forward(twin, zero)
        for start in range(0, d_in, PROBE_ROWS):
            rows = zero.new_zeros(min(PROBE_ROWS, d_in - start), d_in)
            rows[:, start:].fill_diagonal_(1)
            weight[:, start : start + len(rows)] = (base_forward(twin, rows) - at_zero).T
    return weight


@torch.no_grad()
def _unpacked(layer: nn.Module) -> Tensor | None:
    """The weight by the storage's own function, where there is one that has been found to be right; else None."""
    if "parametrizations" in layer._modules:  # its weight is computed, and statistics of it would move on
        return None
    kind = (type(layer), type(getattr(layer, "weight", None)), storage_of(layer))
    if _UNPACKS.get(kind, True) is False or (weight := _by_its_own_function(layer)) is None:
        return None
    weight = weight.to(probe_dtype(layer))
    if kind not in _UNPACKS and not torch.compiler.is_compiling():
        probed = _probed(layer)
        same = weight.shape == probed.shape and torch.allclose(
            weight, probed, rtol=0, atol=0.01 * float(probed.abs().max())
        )
        _UNPACKS[kind] = same
        return weight if same else None
    return weight


_UNPACKS: dict[tuple[type, type, str], bool] = {}  # by class of layer, of weight, and storage


def _by_its_own_function(layer: Any) -> Tensor | None:
    storage = storage_of(layer)
    if storage == "dense":
        return None
    if storage.startswith("bnb"):
        return read_bitsandbytes(layer)
    holder = layer if hasattr(layer, "dequantize") else getattr(layer, "weight", None)
    dequantize: Callable[[], Tensor] | None = getattr(holder, "dequantize", None)
    if dequantize is None or type(holder) in (nn.Parameter, Tensor):
        return None
    return dequantize()


def bias_of(layer: nn.Module) -> Tensor:
    """What the frozen layer makes of zeros, (d_out,), in the dtype of `dense_weight`; zeros where it has no bias."""
    if is_plain(layer):
        bias: Tensor | None = getattr(layer, "bias", None)
        return layer.weight.new_zeros(layer.out_features) if bias is None else bias.detach()
    if is_embedding(layer):
        return layer.weight.new_zeros(layer.embedding_dim)
    with probe(layer, bias=True) as (twin, zero):
        return base_forward(twin, zero)[0]


def plain_weight(layer: nn.Module) -> Tensor | None:
    """The weight as (d_out, d_in) where the layer is of a kind that can be looked at, else None."""
    if is_plain(layer):
        return layer.weight.detach()
    if is_convolution(layer):
        return flat_weight(layer).detach()
    if is_table(layer):
        return layer.weight.detach().T
    weight: Any = layer.weight if is_conv1d(layer) else None
    return None if weight is None else weight.detach().T


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
