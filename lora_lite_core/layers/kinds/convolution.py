"""Convolutions as linear layers: on the patches of their input, with the weight made flat."""

from __future__ import annotations

from typing import Any, TypeGuard

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


def rows_of(layer: nn.Module, x: Tensor) -> Tensor:
    """The rows (…, d_in) that the weight of any target multiplies: patches, or what a linear layer receives."""
    return patches(layer, x) if is_convolution(layer) else x


def channels_last(layer: nn.Conv2d, y: Tensor) -> Tensor:
    """(…, channels, *places) → (…, *places, channels)."""
    return y.movedim(-len(layer.kernel_size) - 1, -1)


def channels_first(layer: nn.Conv2d, y: Tensor) -> Tensor:
    """The way back."""
    return y.movedim(-1, -len(layer.kernel_size) - 1)
