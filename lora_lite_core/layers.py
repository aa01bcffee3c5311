"""What the core knows about a base layer: its sizes, its frozen forward, its dense weight, and a sketch of it."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TypeGuard

import torch
from torch import Tensor, nn

PROBE_ROWS = 256  # identity rows per block when a weight is probed
SKETCH_SIZE = 16  # projections of a sketch


def layer_sizes(layer: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear-like layer, None for any other module.

    Read from in_features/out_features, or nx/nf (Hugging Face Conv1D); never from the shape of a weight, which
    quantised layers pack.
    """
    for first, second in (("in_features", "out_features"), ("nx", "nf")):
        d_in, d_out = getattr(layer, first, None), getattr(layer, second, None)
        if isinstance(d_in, int) and isinstance(d_out, int):
            return d_in, d_out
    return None


def layer_device(layer: nn.Module) -> torch.device:
    """Where the layer's weight is."""
    return next((t.device for t in _tensors(layer)), torch.device("cpu"))


def layer_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype of the layer's first floating-point tensor, float32 when it has none (packed quantised weights)."""
    return next((t.dtype for t in _tensors(layer) if t.dtype in _FLOATS), torch.float32)


def input_name(layer: nn.Module) -> str:
    """How the layer's forward calls its input, for callers that write layer(input=x)."""
    return _after_self(type(layer).forward)


@functools.lru_cache(maxsize=256)
def _after_self(forward: Callable[..., object]) -> str:
    return [*inspect.signature(forward).parameters, "input", "input"][1]


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
    d_in, d_out = _sizes(layer)
    dtype, device = _probe_dtype(layer), layer_device(layer)
    weight = torch.empty(d_out, d_in, dtype=dtype, device=device)
    with _probing(layer):
        at_zero = base_forward(layer, torch.zeros(1, d_in, dtype=dtype, device=device))
        for start in range(0, d_in, PROBE_ROWS):
            rows = torch.zeros(min(PROBE_ROWS, d_in - start), d_in, dtype=dtype, device=device)
            rows[:, start:].fill_diagonal_(1)
            weight[:, start : start + len(rows)] = (base_forward(layer, rows) - at_zero).T
    return weight


def sketch(layer: nn.Module) -> Tensor:
    """Sixteen fixed cosine projections uₖᵀ W vₖ (‖uₖ‖ = ‖vₖ‖ = 1) and the RMS of W as probed by them: (17,) float32.

    It recognises a weight: it survives rounding to bfloat16 and float16, and tells other weights, permutations, sign
    flips and a 1 % fine-tune apart. Quantised and other special layers are run on the sixteen rows, not unpacked.
    """
    d_in, d_out = _sizes(layer)
    device = layer_device(layer)
    rows = _cosines(SKETCH_SIZE, d_in, (math.sqrt(5) - 1) / 2).to(device)
    columns = _cosines(SKETCH_SIZE, d_out, math.sqrt(2) - 1).to(device)
    weight = layer.weight.T if is_plain(layer) else layer.weight if is_conv1d(layer) else None
    with _probing(layer):
        if isinstance(weight, Tensor):
            images = rows @ weight.detach().to(rows.dtype)
        else:
            dtype = _probe_dtype(layer)
            at_zero = base_forward(layer, torch.zeros(1, d_in, dtype=dtype, device=device))
            images = (base_forward(layer, rows.to(dtype)) - at_zero).to(rows.dtype)
        projections = (images * columns).sum(-1)
        return torch.cat([projections, images.square().mean().sqrt().reshape(1)]).float()


def storage_of(layer: nn.Module) -> str:
    """How the layer keeps its weight: "dense" for floating point, "bnb-nf4", "bnb-int8" …, else the class of the weight
    (torchao, quanto) or of the layer."""
    kind = type(layer).__name__
    weight = getattr(layer, "weight", None)
    if kind == "Linear4bit":
        return f"bnb-{getattr(weight, 'quant_type', '4bit')}"
    if kind == "Linear8bitLt":
        return "bnb-int8"
    if type(weight) is nn.Parameter and weight.dtype in _FLOATS:
        return "dense"
    return kind if type(weight) in (nn.Parameter, Tensor, type(None)) else type(weight).__name__


def misbehaviour(layer: nn.Module) -> str:
    """Why a frozen layer cannot carry adapters, as a clause, or "": tried on two rows, except on the usual classes."""
    if is_plain(layer) or is_conv1d(layer) or storage_of(layer).startswith("bnb"):
        return ""
    draws = torch.randn(3, _sizes(layer)[0], generator=torch.Generator().manual_seed(0))
    rows = draws.to(layer_device(layer), _probe_dtype(layer))
    rows[2] = rows[0] + rows[1]
    with torch.enable_grad():
        rows.requires_grad_()
        images: object = base_forward(layer, rows)
        if not isinstance(images, Tensor):
            return f"returns a {type(images).__name__}, not a tensor"
        if images.requires_grad:
            images.sum().backward(inputs=[rows])
        if rows.grad is None:
            return (
                "passes no gradient to its input, so that adapters on it and before it would silently not be trained "
                "(a weight-only quantisation, or bitsandbytes, does)"
            )
    with torch.no_grad():
        rest = images[0] + images[1] - base_forward(layer, torch.zeros_like(rows[:1]))[0] - images[2]
        return "" if rest.norm() <= 0.1 * images[2].norm() else "is not affine in its input"


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _tensors(layer: nn.Module) -> Iterator[Tensor]:
    for name, tensor in (*layer._parameters.items(), *layer._buffers.items()):
        if tensor is not None and not name.startswith("lora_"):  # an adapter's, not the layer's
            yield tensor
    yield from (value for value in vars(layer).values() if isinstance(value, Tensor))  # HQQ keeps W_q as an attribute


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """An nn.Linear whose weight is what it looks like; subclasses of either may store it in another way."""
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter


def is_conv1d(layer: nn.Module) -> bool:
    """Hugging Face's Conv1D: a plain weight, transposed."""
    return type(layer).__name__ == "Conv1D" and type(getattr(layer, "weight", None)) is nn.Parameter


def _sizes(layer: nn.Module) -> tuple[int, int]:
    sizes = layer_sizes(layer)
    assert sizes is not None, f"{type(layer).__name__} is not linear-like; targets are"
    return sizes


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


def _cosines(count: int, size: int, ratio: float) -> Tensor:
    """(count, size) unit rows cos(ωₖ(i + ½)), the ωₖ spread over (0, π) by multiples of an irrational ratio."""
    frequencies = math.pi * torch.remainder(ratio * torch.arange(1, count + 1, dtype=torch.float64, device="cpu"), 1.0)
    rows = torch.cos(frequencies[:, None] * (torch.arange(size, dtype=torch.float64, device="cpu") + 0.5))
    rows = rows / rows.norm(dim=-1, keepdim=True)
    return rows.float()
