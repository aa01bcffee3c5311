"""The product that keeps no matrix for backward, against the plain expression."""

from __future__ import annotations

import copy

import pytest
import torch
from lora_lite_tensor import _hadamard
from lora_lite_tensor._hadamard import hadamard_delta
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll

D_IN, D_OUT, R = 7, 11, 3


@pytest.fixture(autouse=True)
def _as_of_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrices here are small: blocks of four rows, the last one shorter."""
    monkeypatch.setattr(_hadamard, "SMALL", 0)
    monkeypatch.setattr(_hadamard, "BLOCK", 4 * D_IN)


def made(x_dtype: torch.dtype = torch.float64, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x (2, 5, d_in), A1, B1, A2, B2."""
    draw = torch.Generator().manual_seed(0)
    shapes = (2, 5, D_IN), (R, D_IN), (D_OUT, R), (R, D_IN), (D_OUT, R)
    dtypes = x_dtype, dtype, dtype, dtype, dtype
    return [torch.randn(*shape, generator=draw).to(t).requires_grad_() for shape, t in zip(shapes, dtypes, strict=True)]


def plain(x: Tensor, A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor) -> Tensor:
    return F.linear(x, (B1 @ A1 * (B2 @ A2)).to(x.dtype))


def gradients(function: object, tensors: list[Tensor]) -> list[Tensor]:
    assert callable(function)
    out: Tensor = function(*tensors)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out, *torch.autograd.grad(out, tensors, direction)]


def test_gradients_and_theirs() -> None:
    tensors = made()
    for ours, expected in zip(gradients(hadamard_delta, tensors), gradients(plain, tensors), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(hadamard_delta, tensors)
    assert torch.autograd.gradgradcheck(hadamard_delta, tensors, fast_mode=True)


@pytest.mark.parametrize("needed", range(5))
def test_one_gradient_alone(needed: int) -> None:
    tensors = [tensor.detach().requires_grad_(number == needed) for number, tensor in enumerate(made())]
    ours, expected = (torch.autograd.grad(one(*tensors).sum(), tensors[needed])[0] for one in (hadamard_delta, plain))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0)])
def test_one_row_and_none(shape: tuple[int, ...]) -> None:
    x, *factors = made()
    tensors = [x[0, 0].expand(*shape, D_IN), *factors]
    for ours, expected in zip(gradients(hadamard_delta, tensors), gradients(plain, tensors), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    tensors = made(x_dtype, dtype)
    exact = gradients(plain, [tensor.detach().double().requires_grad_() for tensor in tensors])
    for ours, usual, expected in zip(gradients(hadamard_delta, tensors), gradients(plain, tensors), exact, strict=True):
        assert ours.dtype == usual.dtype
        off, usually = ((found.double() - expected).norm() for found in (ours, usual))
        assert off <= 1.6 * usually + 1e-6 * expected.norm()


def test_autocast() -> None:
    tensors = made(torch.float32, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, usual = gradients(hadamard_delta, tensors), gradients(plain, tensors)
    for one, other in zip(ours, usual, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.2)


def test_functional_gradients_vmap_and_compile() -> None:
    x, *factors = (tensor.detach() for tensor in made())

    def loss(function: object, x: Tensor) -> Tensor:
        assert callable(function)
        return function(x, *factors).square().sum()

    ours, expected = (torch.func.vmap(torch.func.grad(lambda x, f=f: loss(f, x)))(x) for f in (hadamard_delta, plain))
    torch.testing.assert_close(ours, expected)
    stacks = [torch.stack([factor, 2 * factor]) for factor in factors]
    torch.testing.assert_close(torch.func.vmap(hadamard_delta)(x, *stacks), torch.func.vmap(plain)(x, *stacks))
    compiled = torch.compile(hadamard_delta, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, *factors), plain(x, *factors))


def test_no_matrix_is_kept() -> None:
    tensors = made()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        hadamard_delta(*tensors)
    assert sorted(t.numel() for t in kept) == sorted(t.numel() for t in tensors)


def test_an_adapter_on_a_large_layer_and_on_a_small_one_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D_IN, D_OUT, dtype=torch.float64))
    for parameter in ll.attach(model, ll.LoHaConfig(r=4)).parameters():
        nn.init.normal_(parameter)
    x, small = torch.randn(5, D_IN, dtype=torch.float64), copy.deepcopy(model)
    model(x).square().sum().backward()
    monkeypatch.setattr(_hadamard, "SMALL", 10**6)
    small(x).square().sum().backward()
    for ours, expected in zip(model.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)


@pytest.mark.parametrize("r", [2, 4])
def test_token_ids(r: int) -> None:
    torch.manual_seed(0)
    layer = nn.Embedding(D_IN, D_OUT, dtype=torch.float64)
    for parameter in ll.attach(nn.Sequential(layer), ll.LoHaConfig(r=r, alpha=3, target_names="0")).parameters():
        nn.init.normal_(parameter)
    A1, B1, A2, B2 = (getattr(layer, f"lora_{name}") for name in ("A1", "B1", "A2", "B2"))
    ids, change = torch.tensor([[0, 6, 3], [3, 1, 1]]), 3 / r * (B1 @ A1) * (B2 @ A2)
    torch.testing.assert_close(layer(ids), layer.weight[ids] + change.T[ids])
