"""MoRA against the dense matrix of its compression, square matrix and decompression."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll

SIZES = [(24, 16), (16, 24), (40, 12), (12, 40), (36, 36)]


def rotation(M: Tensor, d_in: int, d_out: int) -> Tensor:
    """Column by column, with complex numbers: entry i of a chunk is the real part of pair i, entry i + q/2 the other."""
    q = len(M)
    columns = []
    for e in torch.eye(d_in, dtype=M.dtype):
        x = [float(e[i % d_in]) for i in range(math.ceil(d_in / q) * q)]
        out: list[Tensor] = []
        for t in range(len(x) // q):
            turned = torch.zeros(q, dtype=M.dtype)
            for i in range(q // 2):
                angle = t * 10000 ** (-2 * i / q)
                z = complex(x[t * q + i], x[t * q + i + q // 2]) * complex(math.cos(angle), math.sin(angle))
                turned[i], turned[i + q // 2] = z.real, z.imag
            out += (M @ turned).unbind()
        columns.append(torch.stack([out[i % len(out)] for i in range(d_out)]))
    return torch.stack(columns, 1)


def sharing(M: Tensor, d_in: int, d_out: int) -> Tensor:
    q = len(M)
    columns = []
    for e in torch.eye(d_in, dtype=M.dtype):
        total = torch.zeros(q, dtype=M.dtype)
        for i in range(math.ceil(d_in / q) * q):
            total[i % q] += e[i % d_in]
        columns.append((M @ total)[torch.arange(d_out) % q])
    return torch.stack(columns, 1)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["rotation", "sharing"])
def test_formula(kind: str, sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*sizes)).double()
    ll.attach(model, ll.LoraLiteConfig(variant="mora", r=2, kind=kind, alpha=3.0))
    layer = model[0]
    nn.init.normal_(layer.lora_M)
    q = round(math.sqrt(2 * sum(sizes)))
    assert layer.lora_M.shape == ((q // 2 * 2,) * 2 if kind == "rotation" else (q, q))
    x = torch.randn(3, 5, sizes[0], dtype=torch.float64, requires_grad=True)
    M = layer.lora_M.detach().clone().requires_grad_()
    change = 1.5 * (rotation if kind == "rotation" else sharing)(M, *sizes)
    got, expected = layer(x), F.linear(x, layer.weight + change, layer.bias)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(got)
    ours = torch.autograd.grad(got, (x, layer.lora_M), direction)
    for a, b in zip(ours, torch.autograd.grad(expected, (x, M), direction), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ll.dense_weight(merged(model)), (layer.weight + change).detach())


def merged(model: nn.Sequential) -> nn.Module:
    import copy

    twin = copy.deepcopy(model)
    ll.merge(twin)
    return twin[0]


def test_a_square_matrix_has_full_rank() -> None:
    """Where a LoRA with as many parameters has rank r."""
    model = nn.Sequential(nn.Linear(36, 36)).double()
    adapter = ll.attach(model, ll.LoraLiteConfig(variant="mora", r=2))
    assert sum(p.numel() for p in adapter.parameters()) == 144 == 2 * (36 + 36)
    nn.init.normal_(model[0].lora_M)
    change = model[0](torch.eye(36).double()) - F.linear(torch.eye(36).double(), model[0].weight, model[0].bias)
    assert torch.linalg.matrix_rank(change) == 36


def test_refusals() -> None:
    with pytest.raises(ll.ConfigError, match=r"MoRAConfig\(kind='rope'\): the kinds are 'rotation', 'sharing'"):
        ll.LoraLiteConfig(variant="mora", kind="rope")
    with pytest.raises(
        ll.TargetError, match=r"r=9\) on a layer 24 → 16 makes a matrix of 18 × 18, .* at most 16: r is from 1 to 7$"
    ):
        ll.attach(nn.Sequential(nn.Linear(24, 16)), ll.LoraLiteConfig(variant="mora", r=9))
    with pytest.raises(ll.TargetError, match=r"matrix of 24 × 24, .* at most 1: the layer is too narrow"):
        ll.attach(nn.Sequential(nn.Linear(300, 1)), ll.LoraLiteConfig(variant="mora", r=2))
