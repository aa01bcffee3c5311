"""The low-rank arithmetic: the delta, and the SVD policy on several spectra."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lora_lite as ll
from lora_lite_core.toolbox import svd as lowrank


def matrix(d_out: int, d_in: int, spectrum: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A float64 matrix with known singular values."""
    generator = torch.Generator().manual_seed(seed)
    n = min(d_out, d_in)
    i = torch.arange(1, n + 1, dtype=torch.float64)
    S = {"decaying": i**-0.75, "fast": 1 / i**2, "flat": torch.linspace(1, 0.9, n, dtype=torch.float64)}[spectrum]
    U, V = (torch.linalg.qr(torch.randn(d, n, generator=generator, dtype=torch.float64)).Q for d in (d_out, d_in))
    return (U * S) @ V.T, S


def angle(first: Tensor, second: Tensor) -> float:
    """The largest principal angle between two column spaces with orthonormal columns, in radians."""
    outside = second - first @ (first.T @ second)
    return float(torch.linalg.matrix_norm(outside, 2).clamp(max=1).asin())


@pytest.mark.parametrize("spectrum", ["decaying", "fast", "flat"])
@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64)])
@pytest.mark.parametrize("smallest", [False, True])
def test_small_matrices_are_exact(spectrum: str, shape: tuple[int, int], smallest: bool) -> None:
    weight, S_true = matrix(*shape, spectrum)
    U, S, Vh = ll.truncated_svd(weight, 8, torch.Generator(), smallest=smallest)
    U_true, _, Vh_true = torch.linalg.svd(weight, full_matrices=False)
    kept = slice(-8, None) if smallest else slice(8)
    torch.testing.assert_close(S, S_true[kept], rtol=1e-7, atol=1e-9)
    assert angle(U_true[:, kept], U) < 1e-6
    assert angle(Vh_true[kept].T, Vh.T) < 1e-6
    identity = torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(U.T @ U, identity, rtol=0, atol=1e-6)
    torch.testing.assert_close(Vh @ Vh.T, identity, rtol=0, atol=1e-6)
    torch.testing.assert_close(U * S @ Vh @ Vh.T, weight @ Vh.T, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("spectrum", "angle_allowed"), [("decaying", 0.05), ("fast", 1e-4)])
def test_large_matrices_are_sketched(spectrum: str, angle_allowed: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "GRAM_LIMIT", 100)
    weight, S_true = matrix(300, 400, spectrum)
    U, S, Vh = ll.truncated_svd(weight, 16, torch.Generator().manual_seed(0))
    torch.testing.assert_close(S, S_true[:16], rtol=1e-3, atol=0)
    U_true, _, Vh_true = torch.linalg.svd(weight, full_matrices=False)
    assert angle(U_true[:, :16], U) < angle_allowed
    assert angle(Vh_true[:16].T, Vh.T) < angle_allowed
    again = ll.truncated_svd(weight, 16, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip((U, S, Vh), again, strict=True))


def test_large_matrices_with_a_flat_spectrum_lose_no_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single directions mean nothing there; what is captured must still be near the best."""
    monkeypatch.setattr(lowrank, "GRAM_LIMIT", 100)
    weight, S_true = matrix(300, 400, "flat")
    U, _, _ = ll.truncated_svd(weight, 16, torch.Generator().manual_seed(0))
    assert float((U.T @ weight).square().sum() / S_true[:16].square().sum()) > 0.95


@pytest.mark.parametrize("smallest", [False, True])
def test_large_matrices_with_a_large_rank_get_a_full_svd(smallest: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "GRAM_LIMIT", 10)
    weight, S_true = matrix(40, 60, "decaying")
    _, S, _ = ll.truncated_svd(weight, 9, torch.Generator(), smallest=smallest)
    torch.testing.assert_close(S, S_true[-9:] if smallest else S_true[:9])


def test_signs_and_dtypes() -> None:
    weight, _ = matrix(20, 30, "decaying")
    U, S, Vh = ll.truncated_svd(weight.bfloat16(), 4, torch.Generator())
    assert {t.dtype for t in (U, S, Vh)} == {torch.float32}
    largest = U.gather(0, U.abs().argmax(0, keepdim=True))
    assert bool((largest > 0).all())


def test_rank_above_the_number_of_singular_values() -> None:
    with pytest.raises(ValueError, match=r"r=9 is more than the 8 singular values of a \(8, 10\) weight"):
        ll.truncated_svd(torch.zeros(8, 10), 9, torch.Generator())


def test_zero_weight() -> None:
    U, S, Vh = ll.truncated_svd(torch.zeros(6, 9), 2, torch.Generator())
    assert float(S.abs().max()) == 0
    assert bool(torch.isfinite(U).all())
    assert bool(torch.isfinite(Vh).all())


@pytest.mark.parametrize("smallest", [False, True])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_rank_deficient_weights_have_orthonormal_directions(shape: tuple[int, int], smallest: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape[0], 3, dtype=torch.float64) @ torch.randn(3, shape[1], dtype=torch.float64)
    U, S, Vh = ll.truncated_svd(weight, 6, torch.Generator(), smallest=smallest)
    for gram in (U.T @ U, Vh @ Vh.T):
        torch.testing.assert_close(gram, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-9)
    assert float(S[3 if not smallest else 0 :].max()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_delta(dtype: torch.dtype) -> None:
    x, A, B = torch.randn(2, 3, 8, dtype=dtype), torch.randn(4, 8), torch.randn(5, 4)
    delta = ll.lowrank_delta(x, A, B, 0.5)
    assert delta.dtype == dtype
    exact = 0.5 * x.double() @ A.to(dtype).double().T @ B.to(dtype).double().T
    torch.testing.assert_close(
        delta.double(),
        exact,
        rtol=3e-2 if dtype == torch.bfloat16 else 1e-5,
        atol=0.1 if dtype == torch.bfloat16 else 1e-5,
    )


@pytest.mark.parametrize("b", [2, 3, 4, 5, 8])
def test_cayley(b: int) -> None:
    torch.manual_seed(0)
    entries = torch.randn(6, b * (b - 1) // 2, dtype=torch.float64, requires_grad=True)
    X = ll.skew(entries, b)
    rows, columns = torch.triu_indices(b, b, 1)
    assert torch.equal(X[:, rows, columns], entries)
    assert torch.equal(X, -X.mT)
    identity = torch.eye(b, dtype=torch.float64)
    R = torch.linalg.inv(identity - X) @ (identity + X)
    torch.testing.assert_close(ll.cayley_offset(X), R - identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(R.mT @ R, identity.expand_as(R), rtol=0, atol=1e-12)
    assert float(ll.cayley_offset(torch.zeros(3, b, b)).abs().max()) == 0
    direction = torch.randn_like(R)
    ours, theirs = (
        torch.autograd.grad(out, entries, direction, retain_graph=True)[0] for out in (ll.cayley_offset(X), R)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_cayley_in_two_dimensions_turns_by_twice_the_arc_tangent() -> None:
    R = ll.cayley_offset(ll.skew(torch.tensor([0.5], dtype=torch.float64), 2)) + torch.eye(2, dtype=torch.float64)
    angle = 2 * torch.atan(torch.tensor(0.5, dtype=torch.float64))
    torch.testing.assert_close(R, torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()]).reshape(2, 2))


@pytest.mark.parametrize("by", ["svd", "qr"])
def test_factors_that_a_product_starts_from(by: str) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(7, 5, dtype=torch.float64)
    W = layer.weight.detach().clone()
    U, S, Vh = torch.linalg.svd(W)
    Q, R = torch.linalg.qr(W)
    expected = (U[:, :3] * S[:3]) @ Vh[:3] / 2 if by == "svd" else Q[:, :3] @ R[:3]
    A, B = torch.randn(3, 7), torch.randn(5, 3)
    A0, B0 = ll.start_factors(layer, A, B, 2.0, by)
    torch.testing.assert_close(B0 @ A0, expected, rtol=0, atol=1e-12)
    assert bool(((A * A0).sum(1) + (B * B0).sum(0) > 0).all()), "the nearer signs"
    assert torch.equal(layer.weight, W)
    with pytest.raises(ll.ConfigError, match="a scale of 0: the start is divided by its root"):
        ll.start_factors(layer, A, B, 0.0, by)
    with pytest.raises(
        ll.ConfigError, match=r"A \(6, 7\) and B \(5, 3\) are not of the start's shapes, \(5, 7\) and \(5, 5\)"
    ):
        ll.start_factors(layer, torch.randn(6, 7), B, 1.0, by)
