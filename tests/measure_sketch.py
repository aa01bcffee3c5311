"""How far sketches move: the measurements behind the tolerances in lora_lite_core/base_check.py.

Run it: uv run python -m tests.measure_sketch
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite_core.layers.weight_sketch import sketch_distance

SIZES = ((64, 64), (128, 512), (512, 128), (768, 768), (1024, 256))


def noise(weight: Tensor, generator: torch.Generator) -> Tensor:
    return weight + 0.01 * weight.square().mean().sqrt() * torch.randn(weight.shape, generator=generator)


CHANGES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "bfloat16": lambda w, g: w.bfloat16().float(),
    "float16": lambda w, g: w.half().float(),
    "1 % noise": noise,
    "another seed": lambda w, g: torch.randn(w.shape, generator=g) * w.std(),
    "rows permuted": lambda w, g: w[torch.randperm(len(w), generator=g)],
    "columns permuted": lambda w, g: w[:, torch.randperm(w.shape[1], generator=g)],
    "sign": lambda w, g: -w,
}


def measure(layers: int) -> dict[str, list[float]]:
    """Distances by change, over random Gaussian and heavy-tailed layers of several sizes."""
    generator = torch.Generator().manual_seed(0)
    distances: dict[str, list[float]] = {change: [] for change in CHANGES}
    for number in range(layers):
        d_out, d_in = SIZES[number % len(SIZES)]
        layer = nn.Linear(d_in, d_out)
        weight = torch.randn(d_out, d_in, generator=generator)
        if number % 2:  # outlier channels, as in language models
            weight = weight * torch.exp(torch.randn(d_in, generator=generator))
        layer.weight.data = 0.02 * weight
        for change, function in CHANGES.items():
            other = copy.deepcopy(layer)
            other.weight.data = function(layer.weight.data, generator)
            distances[change].append(sketch_distance(ll.sketch(layer), ll.sketch(other)))
    return distances


def main() -> None:
    for change, distances in measure(layers=300).items():
        values = torch.tensor(distances)
        print(f"{change:18} min {values.min():.4f}  median {values.median():.4f}  max {values.max():.4f}")  # noqa: T201


if __name__ == "__main__":
    main()
