"""OFT against the block-diagonal rotation, and against the peft package with its documented differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll
from tests.oracles import D_IN, D_OUT, assert_same, filled, peft_twin


def skew(entries: Tensor, b: int) -> Tensor:
    rows, columns = torch.triu_indices(b, b, 1)
    Q = torch.zeros(b, b, dtype=entries.dtype).index_put((rows, columns), entries)
    return Q - Q.T


def rotation(q: Tensor, b: int) -> Tensor:
    blocks = []
    for entries in q:
        Q = skew(entries, b)
        identity = torch.eye(b, dtype=q.dtype)
        blocks.append((identity + Q) @ torch.linalg.inv(identity - Q))
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("b", [2, 3, 4, 8, 24])
def test_formula(b: int) -> None:
    layer, x = filled(ll.OFTConfig(block_size=b), size=0.5)
    q = layer.lora_q.detach().clone().requires_grad_()
    assert_same(layer, x, F.linear(x, layer.weight @ rotation(q, b), layer.bias), {"lora_q": q}, 1e-11)


@pytest.mark.parametrize("b", [2, 4, 8])
def test_orthogonality(b: int) -> None:
    layer, _ = filled(ll.OFTConfig(block_size=b), torch.float32)
    hook = ll.get_variant("oft").forward_input
    R = hook({"x": torch.eye(D_IN), "params": {"lora_q": layer.lora_q}, "cfg": ll.OFTConfig(block_size=b)}).detach()
    assert float((R @ R.T - torch.eye(D_IN)).abs().max()) < 1e-5


def test_counts_and_liveness() -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    adapter = ll.attach(model, ll.OFTConfig(block_size=8))
    assert sum(p.numel() for p in adapter.parameters()) == D_IN * 7 // 2
    model(torch.randn(3, D_IN)).square().sum().backward()
    assert float(model[0].lora_q.grad.abs().min()) > 0


def test_block_sizes_that_do_not_divide() -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    with pytest.raises(ll.ConfigError) as caught:
        ll.attach(model, ll.OFTConfig())
    assert (
        str(caught.value)
        == "0: OFTConfig(block_size=32) does not divide d_in=24; block sizes that do: [2, 3, 4, 6, 8, 12, 24]"
    )
    with pytest.raises(ll.ConfigError, match=r"OFTConfig\(block_size=1\): a rotation needs a block of at least 2"):
        ll.OFTConfig(block_size=1)


def polynomial(Q: Tensor, terms: int) -> Tensor:
    """As the peft package adds it up: twice each power but the last, and no fewer than three."""
    powers = [torch.linalg.matrix_power(Q, k) for k in range(max(terms, 4))]
    if terms == 2:
        return powers[0] + 2 * powers[1]
    return powers[0] + 2 * sum(powers[1:-1], torch.zeros_like(Q)) + powers[-1]


@pytest.mark.parametrize("terms", [2, 3, 4, 5, 8])
def test_the_truncated_series(terms: int) -> None:
    layer, x = filled(ll.OFTConfig(block_size=6, terms=terms), size=0.2)
    q = layer.lora_q.detach().clone().requires_grad_()
    R = torch.block_diag(*(polynomial(skew(entries, 6), terms) for entries in q))
    assert_same(layer, x, F.linear(x, layer.weight @ R, layer.bias), {"lora_q": q}, 1e-11)


@pytest.mark.parametrize("made", [ll.OFTConfig, ll.PSOFTConfig])
def test_a_series_that_would_never_end(made: Any) -> None:
    """Of a file, say."""
    with pytest.raises(ll.ConfigError, match=r"\(terms=1000000000\): at most 100, .*; None turns exactly"):
        made(terms=10**9)


def test_the_series_nears_the_exact_rotation() -> None:
    q = 0.02 * torch.randn(4, 15, dtype=torch.float64)
    errors = []
    for terms in (2, 4, 6, 9):
        R = torch.block_diag(*(polynomial(skew(entries, 6), terms) for entries in q))
        errors.append(float((R - rotation(q, 6)).abs().max()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6 * errors[0]


@pytest.mark.parametrize("terms", [None, 5])
def test_one_block_for_all_places(terms: int | None) -> None:
    layer, x = filled(ll.OFTConfig(block_size=6, block_share=True, terms=terms), size=0.2)
    assert layer.lora_q.shape == (1, 15)
    q = layer.lora_q.detach().clone().requires_grad_()
    R = rotation(q, 6) if terms is None else polynomial(skew(q[0], 6), terms)
    assert_same(layer, x, F.linear(x, layer.weight @ torch.block_diag(R, R, R, R), layer.bias), {"lora_q": q}, 1e-11)


def test_constrained() -> None:
    """Blocks with ‖Q‖ above eps / √n are scaled down to it, the others left; the gradient is that at what is used."""
    eps = 0.4
    layer, x = filled(ll.OFTConfig(block_size=6, coft=True, eps=eps))
    layer.lora_q.data *= torch.tensor([0.01, 1, 0.02, 3], dtype=torch.float64)[:, None]
    used = []
    for entries in layer.lora_q.detach():
        norm = float(torch.linalg.matrix_norm(skew(entries, 6)))
        used.append(entries * (eps / 2 / norm) if norm > eps / 2 else entries)
    q = torch.stack(used).requires_grad_()
    assert_same(layer, x, F.linear(x, layer.weight @ rotation(q, 6), layer.bias), {"lora_q": q}, 1e-11)
    assert torch.equal(used[0], layer.lora_q[0])
    assert torch.equal(used[2], layer.lora_q[2])
    layer.lora_q.data.zero_()
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), layer.lora_q)
    assert bool(gradient.isfinite().all())


def test_what_is_bounded_comes_back() -> None:
    """A straight projection would give no gradient along q once it is outside."""
    layer, x = filled(ll.OFTConfig(block_size=24, coft=True, eps=0.3))
    layer.lora_q.data *= 0.06
    goal = F.linear(x, layer.weight, layer.bias).detach()
    optimizer = torch.optim.SGD([layer.lora_q], lr=5e-3)
    start = float((layer(x) - goal).detach().square().mean())
    for _ in range(400):
        optimizer.zero_grad()
        (layer(x) - goal).square().sum().backward()
        optimizer.step()
    assert float((layer(x) - goal).detach().square().mean()) < 1e-3 * start


def test_options_that_make_no_sense() -> None:
    with pytest.raises(
        ll.ConfigError, match=r"OFTConfig\(terms=1\): a series that turns has at least 2 terms; None tu"
    ):
        ll.OFTConfig(terms=1)
    with pytest.raises(ll.ConfigError, match=r"OFTConfig\(eps=0\): the bound on Q is a number above 0"):
        ll.OFTConfig(eps=0)


@pytest.mark.parametrize("neumann", [True, False])
@pytest.mark.parametrize("coft", [True, False])
@pytest.mark.parametrize("block_share", [True, False])
def test_parity_with_peft(neumann: bool, coft: bool, block_share: bool) -> None:
    """peft multiplies rows by Rᵢ, so its series turns the other way; its exact mode computes the inverse besides."""
    peft = pytest.importorskip("peft")
    options: dict[str, Any] = {"coft": coft, "eps": 0.3, "block_share": block_share}
    layer, x = filled(ll.OFTConfig(block_size=8, terms=5 if neumann else None, **options), torch.float32, size=0.1)
    config = peft.OFTConfig(r=0, oft_block_size=8, use_cayley_neumann=neumann, target_modules=["0"], **options)
    theirs, inner = peft_twin(layer, config)
    weight = inner.oft_R["default"].weight
    weight.data = (-layer.lora_q.data if neumann else layer.lora_q.data).clone()
    ours, expected = layer(x), theirs(x)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    (a,) = torch.autograd.grad(ours.square().mean(), layer.lora_q)
    (b,) = torch.autograd.grad(expected.square().mean(), weight)
    torch.testing.assert_close(a, -b if neumann else b, rtol=1e-4, atol=1e-5)
