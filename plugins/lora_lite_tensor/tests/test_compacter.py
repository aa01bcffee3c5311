"""Compacter against sums of Kronecker products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))


class Net(nn.Module):
    def __init__(self, width: int = 12, blocks: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def matrix(A: Tensor, s: Tensor, t: Tensor) -> Tensor:
    return torch.stack([torch.kron(a, torch.outer(u, v)) for a, u, v in zip(A, s, t, strict=True)]).sum(0)


@pytest.mark.parametrize(("n", "r"), [(4, 8), (2, 6), (1, 3)])
def test_formula(n: int, r: int) -> None:
    model, x = net(), torch.randn(5, 12, dtype=torch.float64)
    adapter = ll.attach(model, ll.CompacterConfig(n=n, r=r))
    assert torch.equal(model(x), net()(x))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.5)
    tensors = {id(p): p.detach().clone().requires_grad_() for p in adapter.parameters()}
    assert len(tensors) == 1 + 3 * 6, "one A for all blocks"
    h = x
    for (_, target), block in zip(adapter.layers().items(), net().layers, strict=True):
        p = {name: tensors[id(tensor)] for name, tensor in target.params.items()}
        D, U = (matrix(p["lora_A"], p[f"lora_{side}_s"], p[f"lora_{side}_t"]) for side in "DU")
        assert (tuple(D.shape), tuple(U.shape)) == ((r, 12), (12, r))
        h = block(h)
        h = h + torch.nn.functional.gelu(h @ D.T + p["lora_D_bias"]) @ U.T + p["lora_U_bias"]
    got = model(x)
    torch.testing.assert_close(got, h, rtol=1e-11, atol=1e-11)
    direction = torch.randn_like(h)
    ours = torch.autograd.grad(got, list(adapter.parameters()), direction)
    theirs = torch.autograd.grad(h, list(tensors.values()), direction)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_count_and_start() -> None:
    model = Net(width=512, blocks=2)
    adapter = ll.attach(model, ll.CompacterConfig(n=4, r=16))
    assert sum(p.numel() for p in adapter.parameters()) == 4**3 + 2 * 3 * (512 + 16)
    (first, _) = adapter.layers().values()
    p = {name: tensor.detach() for name, tensor in first.params.items()}
    assert float(matrix(p["lora_A"], p["lora_D_s"], p["lora_D_t"]).std()) == pytest.approx(512**-0.5, rel=0.5)
    assert not p["lora_U_s"].any()


def test_a_file_has_the_slow_weights_once(tmp_path: Path) -> None:
    model, x = net(), torch.randn(5, 12, dtype=torch.float64)
    for parameter in ll.attach(model, ll.CompacterConfig(r=8)).parameters():
        nn.init.normal_(parameter, std=0.5)
    ll.save(model, tmp_path / "file.safetensors")
    assert [name for name in ll.inspect(tmp_path / "file.safetensors").tensors if "layers" not in name] == [
        "lora_phm_4x4x4"
    ]
    other = net()
    ll.load(other, tmp_path / "file.safetensors")
    assert torch.equal(other(x), model(x))


def test_refusals() -> None:
    with pytest.raises(ll.TargetError, match=r"n=4, r=6\) on a block of width 12: n may be one of \[1, 2, 3, 6\]"):
        ll.attach(net(), ll.CompacterConfig(r=6))
    with pytest.raises(ll.ConfigError, match=r"CompacterConfig\(n=0\): a whole number of at least 1"):
        ll.CompacterConfig(n=0)
    model: Any = net()
    ll.attach(model, ll.CompacterConfig(r=8))
    with pytest.raises(ll.MergeError):
        ll.merge(model)
