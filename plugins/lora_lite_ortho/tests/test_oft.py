"""OFT against the block-diagonal rotation, and against the peft package with its documented differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll
from tests.oracles import D_IN, D_OUT, assert_same, filled, peft_twin


def rotation(q: Tensor, b: int) -> Tensor:
    rows, columns = torch.triu_indices(b, b, 1)
    blocks = []
    for entries in q:
        Q = torch.zeros(b, b, dtype=q.dtype).index_put((rows, columns), entries)
        Q = Q - Q.T
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


@pytest.mark.parametrize("neumann", [True, False])
def test_parity_with_peft(neumann: bool) -> None:
    """peft multiplies rows by Rᵢ, so its rotation is ours transposed; its exact mode computes the inverse besides."""
    peft = pytest.importorskip("peft")
    layer, x = filled(ll.OFTConfig(block_size=8), torch.float32, size=0.005)
    config = peft.OFTConfig(r=0, oft_block_size=8, use_cayley_neumann=neumann, target_modules=["0"], module_dropout=0.0)
    theirs, inner = peft_twin(layer, config)
    weight = inner.oft_R["default"].weight
    weight.data = (-layer.lora_q.data if neumann else layer.lora_q.data).clone()
    ours, expected = layer(x), theirs(x)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    (a,) = torch.autograd.grad(ours.square().mean(), layer.lora_q)
    (b,) = torch.autograd.grad(expected.square().mean(), weight)
    torch.testing.assert_close(a, -b if neumann else b, rtol=1e-2 if neumann else 1e-4, atol=1e-4 if neumann else 1e-5)
