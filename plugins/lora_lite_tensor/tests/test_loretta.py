"""LoRETTA against its trains, entry by entry."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from lora_lite_tensor._widths import factors
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll
from tests.oracles import D_IN, D_OUT, assert_same, filled


def factor(cores: list[Tensor], sizes: tuple[int, ...]) -> Tensor:
    """(width, r), a product of matrices for every entry's row."""
    rows = []
    for place in itertools.product(*map(range, sizes)):
        row = cores[0][place[0]][None]
        for core, i in zip(cores[1:-1], place[1:], strict=True):
            row = row @ core[:, i]
        rows.append(row @ cores[-1])
    return torch.cat(rows)


@pytest.mark.parametrize(
    "fields", [{"r": 3}, {"r": 2, "tt_rank": 1, "axes": 2, "alpha": 6.0}, {"r": 2, "axes": 5}], ids=str
)
def test_formula(fields: dict[str, Any]) -> None:
    layer, x = filled(ll.LoRETTAConfig(**fields), size=0.6)
    axes = fields.get("axes", 3)
    p = {
        f"lora_{side}{i}": getattr(layer, f"lora_{side}{i}").detach().clone().requires_grad_()
        for side in "AB"
        for i in range(axes + 1)
    }
    A, B = (
        factor([p[f"lora_{side}{i}"] for i in range(axes + 1)], factors(width, axes))
        for side, width in (("A", D_IN), ("B", D_OUT))
    )
    scale = fields.get("alpha", fields["r"]) / fields["r"]
    assert_same(layer, x, F.linear(x, layer.weight + scale * B @ A.T, layer.bias), p, 1e-10)


@pytest.mark.parametrize("axes", [2, 3, 4])
def test_start(axes: int) -> None:
    """A's entries have the size of LoRA's, those of B without its last core that of 1, whatever the axes."""
    sizes = [], []
    for seed in range(40):
        layer: Any = nn.Linear(64, 32)
        ll.attach(nn.Sequential(layer), ll.LoRETTAConfig(axes=axes), seed=seed)
        cores = {side: [getattr(layer, f"lora_{side}{i}").detach() for i in range(axes + 1)] for side in "AB"}
        assert not cores["B"][-1].any()
        sizes[0].append(factor(cores["A"], factors(64, axes)).square().mean())
        sizes[1].append(factor([*cores["B"][:-1], torch.eye(5)], factors(32, axes)).square().mean())
    assert math.sqrt(float(torch.stack(sizes[0]).mean()) * 3 * 64) == pytest.approx(1, rel=0.3)
    assert math.sqrt(float(torch.stack(sizes[1]).mean())) == pytest.approx(1, rel=0.3)


@pytest.mark.parametrize(
    ("width", "count", "expected"),
    [
        (16, 3, (4, 2, 2)),
        (24, 2, (6, 4)),
        (4096, 3, (16, 16, 16)),
        (7, 3, (7, 1, 1)),
        (1, 2, (1, 1)),
        (770, 3, (11, 10, 7)),
    ],
)
def test_factors(width: int, count: int, expected: tuple[int, ...]) -> None:
    assert factors(width, count) == expected


def test_it_is_small() -> None:
    layer = nn.Linear(1024, 1024)
    adapter = ll.attach(nn.Sequential(layer), ll.LoRETTAConfig(r=8))
    sizes = factors(1024, 3)
    assert sum(p.numel() for p in adapter.parameters()) == 2 * (5 * sizes[0] + 25 * (sizes[1] + sizes[2]) + 40) == 1040


def test_more_axes_than_any_width_has() -> None:
    """Of a file, say: answered at once."""
    with pytest.raises(ll.ConfigError, match=r"LoRETTAConfig\(axes=1000000000000\): at most 32"):
        ll.LoRETTAConfig(axes=10**12)


def test_refusals() -> None:
    with pytest.raises(ll.ConfigError, match=r"LoRETTAConfig\(tt_rank=0\): a whole number of at least 1"):
        ll.LoRETTAConfig(tt_rank=0)
    with pytest.raises(ll.ConfigError, match=r"LoRETTAConfig\(axes=1\): a whole number of at least 2"):
        ll.LoRETTAConfig(axes=1)
