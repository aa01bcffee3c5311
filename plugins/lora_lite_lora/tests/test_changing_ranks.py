"""SoRA and DyLoRA: ranks that close in training, and ranks that are chosen in use."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll
from tests.oracles import assert_same

SIZES = [(12, 8), (8, 12)]
X = torch.randn(16, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
GOAL = torch.randn(16, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10)).double()


def moved(adapter: ll.Adapter, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=size)


def filled(cfg: ll.AdapterConfig, d_in: int = 12, d_out: int = 8) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(d_in, d_out).double()
    adapter = ll.attach(nn.Sequential(layer), cfg)
    x = torch.randn(5, d_in, dtype=torch.float64, requires_grad=True)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias)), "the identity"
    moved(adapter)
    return layer, x


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    F.mse_loss(model(X), GOAL).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize(("d_in", "d_out"), SIZES)
def test_soras_formula(d_in: int, d_out: int, alpha: float | None) -> None:
    layer, x = filled(ll.SoRAConfig(r=3, alpha=alpha), d_in, d_out)
    A, B, g = (getattr(layer, f"lora_{key}").detach().clone().requires_grad_() for key in "ABg")
    expected = F.linear(x, layer.weight + (alpha or 3.0) / 3 * B @ torch.diag(g) @ A, layer.bias)
    assert_same(layer, x, expected, {"lora_A": A, "lora_B": B, "lora_g": g}, 1e-10)


def test_sora_is_the_proximal_gradient_method() -> None:
    """Twenty steps of SGD beside an account of them: g goes down the slope, and is then cut by ξ."""
    model, lr, xi = net(), 0.1, 0.05
    adapter = ll.attach(model, ll.SoRAConfig(r=4, threshold=xi, target_names=("^0$",)))
    moved(adapter, 0.3)
    A, B, g = (adapter.layers()["0"].params[f"lora_{key}"].detach().clone().requires_grad_() for key in "ABg")
    optimizer = torch.optim.SGD(adapter.parameters(), lr=lr)
    ll.follow(model, optimizer)
    base = net()
    for _ in range(20):
        hidden = F.linear(X, base[0].weight.detach() + B @ torch.diag(g) @ A, base[0].bias)
        expected = base[2](base[1](hidden))
        torch.testing.assert_close(model(X), expected, rtol=1e-10, atol=1e-12)
        step(model, optimizer)
        gradients = torch.autograd.grad(F.mse_loss(expected, GOAL), (A, B, g))
        with torch.no_grad():
            for tensor, gradient in zip((A, B, g), gradients, strict=True):
                tensor -= lr * gradient
            for k in range(4):
                g[k] = max(abs(float(g[k])) - xi, 0) * (1 if g[k] > 0 else -1)
    assert 0 < int((g == 0).sum()) < 4, "some gates are closed, and exactly"
    assert int((base[0].weight == model[0].weight).all())


def test_soras_closed_gates_are_no_rank(tmp_path: Path) -> None:
    model = net()
    adapter = ll.attach(model, ll.SoRAConfig(r=4, threshold=0.05))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    ll.follow(model, optimizer)
    for _ in range(200):
        step(model, optimizer)
    x, expected = X, model.eval()(X).detach()
    ll.save(model, tmp_path / "a.safetensors")
    again = net()
    ll.load(again, tmp_path / "a.safetensors")
    assert torch.equal(again.eval()(x), expected), "what the gates are yet to be cut by is saved"
    changes = []
    for name in ("0", "2"):
        layer = model.get_submodule(name)
        d_in = layer.weight.shape[1]
        changes.append((layer(torch.eye(d_in).double()) - layer.bias).T - layer.weight)
    assert [int(torch.linalg.matrix_rank(change)) for change in changes] == [0, 0], (
        "nothing holds them open so strongly"
    )


def test_without_a_threshold_no_gate_closes() -> None:
    model = net()
    adapter = ll.attach(model, ll.SoRAConfig(r=4, threshold=0.0))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3, weight_decay=0.0)
    start = adapter.layers()["0"].params["lora_g"].detach().clone()
    ll.follow(model, optimizer)
    for _ in range(20):
        step(model, optimizer)
    assert float((adapter.layers()["0"].params["lora_g"] - start).detach().abs().max()) < 0.021


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize(("d_in", "d_out"), SIZES)
def test_dylora_is_a_lora_of_each_rank(d_in: int, d_out: int, rank: int, alpha: float | None) -> None:
    layer, x = filled(ll.DyLoRAConfig(r=5, use_r=rank, alpha=alpha), d_in, d_out)
    A, B = (getattr(layer, f"lora_{key}").detach().clone().requires_grad_() for key in "AB")
    scale = 1.0 if alpha is None else alpha / rank
    expected = F.linear(x, layer.weight + scale * B[:, :rank] @ A[:rank], layer.bias)
    assert_same(layer.eval(), x, expected, {"lora_A": A, "lora_B": B}, 1e-10)
    layer.lora_b.fill_(2)
    cut = (1.0 if alpha is None else alpha / 2) * B[:, :2] @ A[:2]
    assert_same(layer.train(), x, F.linear(x, layer.weight + cut, layer.bias), {"lora_A": A, "lora_B": B}, 1e-10)


def test_dyloras_draws() -> None:
    """Uniform from min_r to each layer's r, in the same place of that range in all layers, from the step alone."""
    model = net()
    adapter = ll.attach(model, ll.DyLoRAConfig(r=6, min_r=3, rank_pattern={"2": 4}, use_r=5))
    assert [int(target.params["lora_rank"]) for target in adapter.layers().values()] == [5, 4]
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.0)
    ll.follow(model, optimizer)
    seen: list[tuple[int, ...]] = []
    for _ in range(400):
        for parameter in adapter.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        seen.append(tuple(int(target.params["lora_b"]) for target in adapter.layers().values()))
    counts = Counter(first for first, _ in seen)
    assert sorted(counts) == [3, 4, 5, 6]
    assert min(counts.values()) > 70
    assert {second for first, second in seen if first <= 4} == {3}
    assert {second for first, second in seen if first >= 5} == {4}


def test_dylora_of_a_file_draws_on(tmp_path: Path) -> None:
    runs = []
    model = net().train()
    adapter = ll.attach(model, ll.DyLoRAConfig(r=6))
    for _ in range(2):
        optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
        ll.follow(model, optimizer)
        if not runs:
            for _ in range(5):
                step(model, optimizer)
            ll.save(model, tmp_path / "a.safetensors")
        drawn = []
        for _ in range(10):
            step(model, optimizer)
            drawn.append(int(adapter.layers()["0"].params["lora_b"]))
        runs.append((drawn, model(X).detach()))
        model = net().train()
        adapter = ll.load(model, tmp_path / "a.safetensors")
    assert runs[0][0] == runs[1][0]
    assert len(set(runs[0][0])) > 2
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=0, atol=0)


def test_dyloras_rank_in_use_is_changed_saved_and_exported(tmp_path: Path) -> None:
    model = net()
    adapter = ll.attach(model, ll.DyLoRAConfig(r=6))
    moved(adapter)
    model.eval()
    whole = model(X).detach()
    for target in adapter.layers().values():
        target.params["lora_rank"].fill_(2)
    cut = model(X).detach()
    assert not torch.allclose(cut, whole, atol=1e-3)
    ll.save(model, tmp_path / "a.safetensors")
    again = net()
    ll.load(again, tmp_path / "a.safetensors")
    torch.testing.assert_close(again.eval()(X), cut, rtol=0, atol=0)
    assert ll.export_lora(model, tmp_path / "lora").rank == 2
    ll.merge(model)
    torch.testing.assert_close(model(X), cut)


def test_what_is_trained_first_is_in_the_first_ranks() -> None:
    """After training to a goal of rank one, the first rank alone is nearly as good as all; not so of LoRA."""
    torch.manual_seed(0)
    goal = nn.Linear(12, 8, bias=False).double()
    goal.weight.data += 2 * torch.outer(torch.randn(8), torch.randn(12)).double()
    left = {}
    for name in ("dylora", "lora"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 8, bias=False)).double()
        adapter = ll.attach(model, ll.LoraLiteConfig(variant=name, r=4))
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=3e-2, weight_decay=0.0)
        ll.follow(model, optimizer)
        for _ in range(300):
            F.mse_loss(model(X), goal(X).detach()).backward()
            optimizer.step()
            optimizer.zero_grad()
        p = adapter.layers()["0"].params
        W = model[0].weight + p["lora_B"][:, :1] @ p["lora_A"][:1]
        left[name] = float(F.mse_loss(F.linear(X, W), goal(X)).detach())
    assert left["dylora"] < 0.1 * left["lora"], left


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (lambda: ll.SoRAConfig(threshold=-1.0), "SoRAConfig(threshold=-1.0): a threshold is a number from 0"),
        (lambda: ll.DyLoRAConfig(r=4, min_r=5), "DyLoRAConfig(min_r=5, r=4): a rank to cut to is from 1 to r"),
        (lambda: ll.DyLoRAConfig(r=4, use_r=0), "DyLoRAConfig(use_r=0, r=4): a rank to cut to is from 1 to r"),
    ],
)
def test_values_that_make_no_sense(cfg: Any, message: str) -> None:
    with pytest.raises(ll.ConfigError) as caught:
        cfg()
    assert message in str(caught.value)
