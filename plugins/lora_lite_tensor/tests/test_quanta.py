"""QuanTA against the difference of two chains of dense matrices."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from lora_lite_tensor._widths import factors
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll
from tests.oracles import D_IN, D_OUT, assert_same, filled


def dense(gate: Tensor, sizes: list[int], m: int, n: int, after: tuple[int, int]) -> Tensor:
    """The matrix on the whole of the folded vector, of one on the axes m < n, place by place."""
    goal = list(sizes)
    goal[m], goal[n] = after
    columns = list(itertools.product(*map(range, sizes)))
    rows = list(itertools.product(*map(range, goal)))
    others = [axis for axis in range(len(sizes)) if axis not in (m, n)]
    row = torch.tensor([i[m] * after[1] + i[n] for i in rows])
    column = torch.tensor([j[m] * sizes[n] + j[n] for j in columns])
    alike = torch.tensor([[all(i[a] == j[a] for a in others) for j in columns] for i in rows])
    return gate[row][:, column] * alike


def chain(matrices: dict[str, Tensor], axes: int) -> Tensor:
    sizes, goal = list(factors(D_IN, axes)), factors(D_OUT, axes)
    product = torch.eye(D_IN, dtype=torch.float64)
    for n, m in itertools.combinations(range(axes - 1, -1, -1), 2):  # the last two first
        gate = matrices[f"{axes - n}{axes - m}"]
        product = dense(gate, sizes, m, n, (goal[m], goal[n])) @ product
        sizes[m], sizes[n] = goal[m], goal[n]
    return product


@pytest.mark.parametrize("axes", [2, 3, 4])
def test_formula(axes: int) -> None:
    layer, x = filled(ll.QuanTAConfig(axes=axes), size=0.2)
    names = [name[7:] for name, _ in layer.named_parameters() if name.startswith("lora_dT")]
    assert len(names) == axes * (axes - 1) // 2
    S = {name: getattr(layer, f"lora_S{name}").detach() for name in names}
    offsets = {name: getattr(layer, f"lora_dT{name}").detach().clone().requires_grad_() for name in names}
    change = chain({name: S[name] + offsets[name] for name in names}, axes) - chain(S, axes)
    expected = F.linear(x, layer.weight + change, layer.bias)
    assert_same(layer, x, expected, {f"lora_dT{name}": value for name, value in offsets.items()}, 1e-10)


def test_the_other_way() -> None:
    """From few to many, and a width without factors."""
    for sizes in ((16, 24), (7, 12), (12, 7)):
        layer: Any = nn.Linear(*sizes, dtype=torch.float64)
        adapter = ll.attach(nn.Sequential(layer), ll.QuanTAConfig(axes=2))
        x = torch.randn(3, sizes[0], dtype=torch.float64)
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        for parameter in adapter.parameters():
            nn.init.normal_(parameter)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight + layer.lora_dT12, layer.bias))


def test_start() -> None:
    layer: Any = nn.Linear(512, 512)
    adapter = ll.attach(nn.Sequential(layer), ll.QuanTAConfig())
    assert sum(p.numel() for p in adapter.parameters()) == 3 * 64 * 64
    for name in ("12", "13", "23"):
        assert not getattr(layer, f"lora_dT{name}").any()
        S = getattr(layer, f"lora_S{name}")
        assert not S.requires_grad
        assert 0.99 / 8 < float(S.abs().max()) <= 1 / 8
        assert float(S.std()) == pytest.approx(1 / (8 * 3**0.5), rel=0.05)
    layer(torch.randn(3, 512)).square().sum().backward()
    assert all(parameter.grad.any() for parameter in adapter.parameters())


def test_more_axes_than_any_width_has() -> None:
    """Of a file, say: answered at once."""
    with pytest.raises(ll.ConfigError, match=r"QuanTAConfig\(axes=1000000000000\): at most 32"):
        ll.QuanTAConfig(axes=10**12)


def test_refusals() -> None:
    with pytest.raises(ll.ConfigError, match=r"QuanTAConfig\(axes=1\): a whole number of at least 2"):
        ll.QuanTAConfig(axes=1)
