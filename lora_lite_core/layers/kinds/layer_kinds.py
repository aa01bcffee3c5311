"""What the core knows about any base layer: its kind, sizes, device, dtype, and how it keeps its weight."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ...contract.errors import UnsupportedLayer
from .convolution import convolution_sizes, is_convolution
from .embedding import embedding_sizes, is_embedding
from .experts import Expert


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


def storage_of(layer: nn.Module) -> str:
    """How the layer keeps its weight: "dense" for floating point, "bnb-nf4", "bnb-int8" …, else the class of the weight
    (torchao, quanto) or of the layer."""
    kind = type(layer).__name__
    parametrised = "parametrizations" in layer._modules  # its weight is computed, and statistics of it moved on
    weight = None if parametrised else getattr(layer, "weight", None)
    if is_a(layer, "bitsandbytes.Linear4bit"):
        return f"bnb-{getattr(weight, 'quant_type', '4bit')}"
    if is_a(layer, "bitsandbytes.Linear8bitLt"):
        return "bnb-int8"
    if type(layer) is Expert or (type(weight) is nn.Parameter and weight.dtype in _FLOATS):
        return "dense"
    return kind if type(weight) in (nn.Parameter, Tensor, type(None)) else type(weight).__name__


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _tensors(layer: nn.Module) -> Iterator[Tensor]:
    for name, tensor in (*layer._parameters.items(), *layer._buffers.items()):
        if tensor is not None and not name.startswith("lora_"):  # an adapter's, not the layer's
            yield tensor
    yield from (value for value in vars(layer).values() if isinstance(value, Tensor))  # HQQ keeps W_q as an attribute
    for inner in layer.children():  # a parametrised layer keeps its weight there
        yield from inner.parameters()


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """An nn.Linear whose weight is what it looks like, or one expert; subclasses may store it in another way."""
    if type(layer) is Expert:
        return True
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter


def is_conv1d(layer: nn.Module) -> bool:
    """Hugging Face's Conv1D: a plain weight, transposed. A class derived from it may compute something else."""
    return type(layer).__name__ == "Conv1D" and type(getattr(layer, "weight", None)) is nn.Parameter


def is_usual(layer: nn.Module) -> bool:
    """Of a class that is known to be affine, to return a tensor, and to pass gradients."""
    special = is_convolution(layer) or is_embedding(layer)
    return special or is_plain(layer) or is_conv1d(layer) or storage_of(layer).startswith("bnb")


def kind_of(layer: nn.Module) -> str:
    """ "linear", "convolution" or "embedding"; "" for what carries no adapter but as a block."""
    if is_convolution(layer):
        return "convolution"
    return "embedding" if is_embedding(layer) else "linear" if layer_sizes(layer) is not None else ""


def target_sizes(layer: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of linear-like layers, of convolutions as layers on patches, of embeddings as layers on tokens."""
    if is_embedding(layer):
        return embedding_sizes(layer)
    return convolution_sizes(layer) if is_convolution(layer) else layer_sizes(layer)


def sizes_of(layer: nn.Module) -> tuple[int, int]:
    sizes = target_sizes(layer)
    if sizes is None:
        raise UnsupportedLayer(f"a {type(layer).__name__} is no linear layer and has no weight to be read")
    return sizes


def is_sharded(tensor: object) -> TypeGuard[Any]:
    """Whether a tensor is a DTensor (FSDP2, tensor parallelism); none is where its module was never imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_a(thing: object, *names: str) -> bool:
    """Whether the object's class, or one that it derives from, has one of these names ("package.Class" where others
    may use the name, too): for classes of packages that the core does not import."""
    return not _names_of(type(thing)).isdisjoint(names)


@functools.lru_cache(maxsize=1024)
def _names_of(kind: type) -> frozenset[str]:
    bases = [(base.__module__.partition(".")[0], base.__name__) for base in kind.__mro__]
    return frozenset((*(name for _, name in bases), *(f"{package}.{name}" for package, name in bases)))
