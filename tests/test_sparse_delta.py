"""Products with sparse matrices, on each of the ways they are computed, against the matrix."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import lora_lite as ll
from lora_lite_core.toolbox import products

D_IN, D_OUT = 24, 40
WAYS = {"entries": (3, 40), "sparse product": (130, 100), "short, matrix": (9, 100), "dense, matrix": (130, 300)}


@pytest.fixture(autouse=True)
def _as_of_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrices here are small, and the way of large ones is to be gone."""
    monkeypatch.setattr(products, "WORTH", 2**15)


def made(rows: int, count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x (2, rows, d_in), places in no order, one of them twice, and their values."""
    generator = torch.Generator().manual_seed(0)
    places = torch.randperm(D_IN * D_OUT, generator=generator)[:count]
    places[-1] = places[0]
    x, values = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((2, rows // 2, D_IN), (count,)))
    return x.requires_grad_(), places, values.requires_grad_()


def matrix(places: Tensor, values: Tensor) -> Tensor:
    S = torch.zeros(D_OUT, D_IN, dtype=values.dtype)
    for place, value in zip(places.tolist(), values, strict=True):
        one = torch.zeros_like(S)
        one[place // D_IN, place % D_IN] = 1
        S = S + value * one
    return S


@pytest.mark.parametrize("way", WAYS)
def test_product_and_gradients(way: str) -> None:
    x, places, values = made(*WAYS[way])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = ll.sparse_delta(x, places, values, D_OUT)
        exact = x @ matrix(places, values).T
        direction = torch.randn_like(exact)
        found = torch.autograd.grad(ours, (x, values), direction)
    for one, other in zip((ours, *found), (exact, *torch.autograd.grad(exact, (x, values), direction)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert ours.is_contiguous()
    assert (type(ours.grad_fn).__name__ == "_SparseProductBackward") == (way == "sparse product")


@pytest.mark.slow
def test_one_gradient_alone_and_gradients_of_gradients() -> None:
    x, places, values = made(*WAYS["sparse product"])
    S = matrix(places, values.detach())
    ours = ll.sparse_delta(x, places, values.detach(), D_OUT)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), x)[0], S.sum(0).expand_as(x))
    ours = ll.sparse_delta(x.detach(), places, values, D_OUT)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), values)[0], x.detach().sum((0, 1))[places % D_IN])
    assert torch.autograd.gradgradcheck(
        lambda x, values: ll.sparse_delta(x, places, values, D_OUT), (x[:, :64], values), atol=1e-8
    )


def test_functional_gradients() -> None:
    x, places, values = made(*WAYS["sparse product"])
    found = torch.func.grad(lambda values: ll.sparse_delta(x.detach(), places, values, D_OUT).square().sum())(
        values.detach()
    )
    exact = (x @ matrix(places, values).T).square().sum()
    torch.testing.assert_close(found, torch.autograd.grad(exact, values)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_other_dtypes(way: str, dtype: torch.dtype) -> None:
    x, places, values = made(*WAYS[way], dtype=dtype)
    ours = ll.sparse_delta(x, places, values.float(), D_OUT)
    assert ours.dtype == dtype
    exact = x.double() @ matrix(places, values.double()).T
    within = {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=within)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", [-1, D_IN * D_OUT])
def test_places_outside(way: str, place: int) -> None:
    x, places, values = made(*WAYS[way])
    places[3] = place
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)|are not in a \(40, 24\) matrix"):
        ll.sparse_delta(x, places, values, D_OUT)


def test_compiled_as_a_whole() -> None:
    x, places, values = made(*WAYS["sparse product"], dtype=torch.float32)
    call = torch.compile(ll.sparse_delta, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call(x, places, values, D_OUT), ll.sparse_delta(x, places, values, D_OUT))


def test_memory_is_that_of_the_entries() -> None:
    """What is kept for backward is x and the entries, and no matrix."""
    x, places, values = made(*WAYS["sparse product"])
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ll.sparse_delta(x, places, values, D_OUT)
    assert {t.numel() for t in kept} == {x.numel(), len(values)}


def test_no_matrix_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_matrix", None)
    for way in ("entries", "sparse product"):
        x, places, values = made(*WAYS[way])
        ll.sparse_delta(x, places, values, D_OUT).sum().backward()
        assert x.grad is not None
