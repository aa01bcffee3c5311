"""Widths as products, for tensors with several axes and for Kronecker products."""

from __future__ import annotations

from math import prod

from torch import nn


def kernel_of(layer: nn.Module) -> int:
    """How many numbers a patch of a convolution has of each channel; 1 for other layers."""
    return prod(layer.kernel_size) if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else 1


def pair(width: int, factor: int) -> tuple[int, int]:
    """Two numbers with this product: the factor and the rest; -1, and a factor that does not divide it, is the nearest
    divisor to its root from below, and at most the factor."""
    if factor > 0 and width % factor == 0:
        return factor, width // factor
    most = min(int(width**0.5), factor if factor > 0 else width)
    small = next(number for number in range(most, 0, -1) if width % number == 0)
    return small, width // small


def factors(width: int, count: int) -> tuple[int, ...]:
    """So many numbers with this product, as even as its primes allow, the largest first."""
    primes: list[int] = []
    rest, prime = width, 2
    while rest > 1:
        while rest % prime == 0:
            primes.append(prime)
            rest //= prime
        prime = prime + 1 if prime * prime <= rest else max(rest, prime + 1)
    made = [1] * count
    for prime in reversed(primes):
        made[made.index(min(made))] *= prime
    assert prod(made) == width
    return tuple(sorted(made, reverse=True))
