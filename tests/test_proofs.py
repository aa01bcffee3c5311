"""Methods of the literature, each a module of tests/variants written from docs/authoring.md alone, against their formula
in float64 (dense matrices, one row of x at a time), against PEFT where it has them, by the kit, and in a short training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite_core.testing import run_checks

FOLDER = Path(__file__).parent / "variants"
NAMES = ["lora_dropout", "blob"]
SIZES = [(24, 16), (16, 24), (16, 16)]  # d_in, d_out


@pytest.fixture(autouse=True)
def _variants(registered: Any) -> None:
    for name in NAMES:
        registered(FOLDER / f"{name}.py", name=name)


def config(name: str, **fields: Any) -> ll.AdapterConfig:
    return ll.LoraLiteConfig(variant=name, **{"r": 4, **fields})


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """24 → 16 → 24 → 24, a layer of each kind of shape."""
    model = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24)).to(dtype)
    for seed, parameter in enumerate(model.parameters()):
        parameter.data.copy_(draw(seed, *parameter.shape) / parameter.shape[-1] ** 0.5)
    return model


def moved(adapter: ll.Adapter) -> None:
    for seed, parameter in enumerate(adapter.parameters()):
        parameter.data.add_(0.3 * draw(100 + seed, *parameter.shape).to(parameter.dtype))


# Formulas: of a layer's tensors and its weight, the change of one output row for one row x. Loops on purpose.


def lora_dropout(p: dict[str, Tensor], W: Tensor, x: Tensor, cfg: Any) -> Tensor:
    return cfg.scale * p["lora_B"] @ p["lora_A"] @ x


FORMULAS: dict[str, Callable[[dict[str, Tensor], Tensor, Tensor, Any], Tensor]] = {
    "lora_dropout": lora_dropout,
    "blob": lora_dropout,  # in evaluation
}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_formula(name: str, sizes: tuple[int, int]) -> None:
    layer = nn.Linear(*sizes, dtype=torch.float64)
    layer.weight.data = draw(1, sizes[1], sizes[0])
    adapter = ll.attach(nn.Sequential(layer), config(name, alpha=6.0))
    x = draw(3, 5, sizes[0])
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    moved(adapter)
    target = adapter.layers()["0"]
    p = {key: tensor.detach() for key, tensor in target.params.items()}
    cfg: Any = target.cfg
    layer.eval()
    for row, y in zip(x, layer(x).detach(), strict=True):
        expected = (
            layer.weight.detach() @ row + layer.bias.detach() + FORMULAS[name](p, layer.weight.detach(), row, cfg)
        )
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_the_kit_is_green(name: str) -> None:
    results = run_checks(config(name))
    assert [result.message for result in results if not result.ok] == []


def test_blobs_sample_and_penalty() -> None:
    """Flipout: one draw of the deviation for the batch, the signs of which are drawn anew for each row."""
    layer = nn.Linear(6, 5, bias=False, dtype=torch.float64)
    model = nn.Sequential(layer)
    adapter = ll.attach(model, config("blob", r=2, alpha=3.0, kl=0.1, prior=0.3))
    moved(adapter)
    p = {key: tensor.detach() for key, tensor in adapter.layers()["0"].params.items()}
    M, G, B = p["lora_A"], p["lora_G"], p["lora_B"]
    x = draw(4, 6).repeat(100_000, 1)
    torch.manual_seed(0)
    change = (layer.train()(x) - x @ layer.weight.T).detach()
    torch.testing.assert_close(change.mean(0), 1.5 * B @ M @ x[0], rtol=0.02, atol=0.02)
    assert 64 < len(change.mul(1e6).round().unique(dim=0)) <= 2 ** (6 + 2), "one deviation under 8 signs"
    covariance = torch.zeros(5, 5).double()
    many = []
    for seed in range(400):
        torch.manual_seed(seed)
        many.append((layer(x[:64]) - x[:64] @ layer.weight.T).detach() - 1.5 * B @ M @ x[0])
    for row in torch.cat(many):
        covariance += torch.outer(row, row) / (400 * 64)
    expected = torch.zeros(5, 5).double()
    for k in range(2):
        variance = sum(float(G[k, j] ** 4 * x[0, j] ** 2) for j in range(6))
        expected += 1.5**2 * variance * torch.outer(B[:, k], B[:, k])
    torch.testing.assert_close(covariance, expected, rtol=0.15, atol=0.05 * float(expected.abs().max()))
    prior = torch.distributions.Normal(0.0, torch.tensor(0.3).double())
    total = 0.0
    for k in range(2):
        for j in range(6):
            posterior = torch.distributions.Normal(M[k, j], G[k, j] ** 2)
            total += float(torch.distributions.kl_divergence(posterior, prior))
    torch.testing.assert_close(ll.penalty(model).item(), 0.1 * total)


# PEFT, from the same tensors.


def beside_peft(name: str, theirs: Any, fields: dict[str, Any], **given: Any) -> tuple[nn.Module, Any, Any]:
    """The model with our adapter, moved, the adapter, and PEFT's model, whose tensors are drawn anew."""
    model = net(torch.float32)
    torch.manual_seed(0)
    other = peft.get_peft_model(copy.deepcopy(model), theirs)
    adapter = ll.attach(model, config(name, **fields), **given)
    moved(adapter)
    return model, adapter, other.eval()


def same(model: nn.Module, other: Any) -> None:
    x = draw(9, 5, 24, dtype=torch.float32)
    changed = model.eval()(x)
    with ll.disabled(model):
        assert not torch.allclose(model(x), changed, atol=1e-2), "it does something"
    torch.testing.assert_close(changed, other(x), rtol=1e-5, atol=1e-5)


LAYERS = ["0", "2", "4"]


@pytest.mark.parametrize("training", [False, True])
def test_lora_dropout_is_that_of_peft(training: bool) -> None:
    """In training with the same draws, of torch's global generator."""
    theirs = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.4, target_modules=LAYERS)
    model, adapter, other = beside_peft("lora_dropout", theirs, {"alpha": 6.0, "dropout": 0.4})
    with torch.no_grad():
        for name, target in adapter.layers().items():
            layer = other.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(target.params["lora_A"])
            layer.lora_B["default"].weight.copy_(target.params["lora_B"])
    if not training:
        same(model, other)
        return
    x, y = draw(9, 5, 24, dtype=torch.float32), []
    for each in (model, other):
        torch.manual_seed(3)
        y.append(each.train()(x))
    torch.testing.assert_close(*y, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(y[0], model(x), atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_learns(name: str) -> None:
    from lora_lite_bench.runs.run import Job, run

    lr = ll.get_variant(name).bench.get("lr", 5e-3)
    losses = run(Job("shifted", {"batch_size": 64}, name, {}, seed=0, lr=lr, steps=30, whole=False)).losses
    assert sum(losses[-3:]) / 3 < 0.3 * losses[0], losses
