"""Convolutions as linear layers: on the patches of their input, with the weight made flat."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_convolution(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """An nn.Conv1d, Conv2d or Conv3d (or a class that computes the same) with a plain weight, not transposed."""
    return (
        isinstance(layer, KINDS)
        and type(layer).forward in [kind.forward for kind in KINDS]
        and type(layer._parameters.get("weight")) is nn.Parameter
    )


def convolution_sizes(layer: nn.Conv2d) -> tuple[int, int]:
    """(d_in, d_out): the numbers of a patch, channels times kernel, and the channels that come out."""
    return layer.weight[0].numel(), layer.out_channels


def flat_weight(layer: nn.Conv2d) -> Tensor:
    """(d_out, d_in): channels of the input slowest, the kernel's last dimension fastest, as in `patches`."""
    return layer.weight.flatten(1)


def patches(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """(…, channels, *size) → (…, *places, d_in): what the kernel sees at each place that it comes to."""
    dims = len(layer.kernel_size)
    padding: Any = layer._reversed_padding_repeated_twice
    if any(padding):
        x = F.pad(x, padding, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    for dim in range(dims):
        size, gap, step = layer.kernel_size[dim], layer.dilation[dim], layer.stride[dim]
        x = x.unfold(dim - dims - dim, gap * (size - 1) + 1, step)[..., ::gap]
    # (…, channels, *places, *kernel)
    return x.movedim(-2 * dims - 1, -dims - 1).flatten(-dims - 1)


_ASKED = ("dtype", "device", "requires_grad", "is_cuda", "is_meta", "layout", "grad_fn", "is_leaf")  # of the image


class Patches(Tensor):
    """The patches of an image, not made yet: a product with them is the convolution of the image, which is faster and
    needs no memory for them; anything else makes them."""

    layer: nn.Conv2d
    image: Tensor

    @classmethod
    def of(cls, layer: nn.Conv2d, image: Tensor) -> Tensor:
        made: Patches = image.as_subclass(cls)
        made.layer, made.image = layer, image
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _computed(func, args, kwargs or {})


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name, x = getattr(func, "__name__", ""), args[0] if args else None
    if isinstance(x, Patches) and not any(isinstance(one, Patches) for one in args[1:]):
        if name == "__get__" and getattr(func.__self__, "__name__", "") in _ASKED:
            return func(x.image)
        if name in ("is_floating_point", "dim", "ndimension"):
            return func(x.image)
        if name in ("to", "dropout"):  # of what the image has in every patch at once, as the peft package drops
            return Patches.of(x.layer, func(x.image, *args[1:], **kwargs))
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        if name == "linear" and isinstance(weight, Tensor) and weight.dim() == 2:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            return channels_last(x.layer, _convolved(x.layer, x.image, weight, bias))
        if name in ("matmul", "__matmul__") and isinstance(weight, Tensor) and weight.dim() == 2:
            return channels_last(x.layer, _convolved(x.layer, x.image, weight.T, None))
    return func(*map(_made, args), **{key: _made(one) for key, one in kwargs.items()})


def _made(value: Any) -> Any:
    """The value with patches in the place of what stands for them, in lists, too."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_made, value))
    return patches(value.layer, value.image) if isinstance(value, Patches) else value


def _convolved(layer: nn.Conv2d, image: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution with other filters: rows (r, d_in) → (…, r, *places)."""
    return layer._conv_forward(image, rows.unflatten(1, layer.weight.shape[1:]), bias)  # pyright: ignore


def rows_of(layer: nn.Module, x: Tensor) -> Tensor:
    """The rows (…, d_in) that the weight of any target multiplies: patches, or what a linear layer receives."""
    return patches(layer, x) if is_convolution(layer) else x


def channels_last(layer: nn.Conv2d, y: Tensor) -> Tensor:
    """(…, channels, *places) → (…, *places, channels)."""
    return y.movedim(-len(layer.kernel_size) - 1, -1)


def channels_first(layer: nn.Conv2d, y: Tensor) -> Tensor:
    """The way back."""
    return y.movedim(-1, -len(layer.kernel_size) - 1)
