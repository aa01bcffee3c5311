"""Widths as products, for tensors with several axes."""

from __future__ import annotations

from math import prod


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
