"""Dropout of what an adapter reads: in training only, from torch's global generator, the same as PEFT's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll

X = torch.randn(16, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
DROPPING: dict[str, Any] = {
    "lora": ll.LoRAConfig(r=4, dropout=0.4, alpha=8),
    "dora": ll.DoRAConfig(r=4, dropout=0.4, alpha=8),
    "pissa": ll.PiSSAConfig(r=4, dropout=0.4, alpha=8),
    "eva": ll.EVAConfig(r=4, dropout=0.4),
    "lora_xs": ll.LoRAXSConfig(r=4, dropout=0.4),
}


def adapted(cfg: Any) -> tuple[nn.Sequential, ll.Adapter]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(24, 20, dtype=torch.float64))
    data = [X] if cfg.variant == "eva" else None
    return model, ll.attach(model, cfg, calibration_data=data)


def moved(adapter: ll.Adapter) -> None:
    torch.manual_seed(2)
    for parameter in adapter.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))


def seeded(model: nn.Module, seed: int = 3) -> Tensor:
    torch.manual_seed(seed)
    y: Tensor = model(X)
    return y.detach()


@pytest.mark.parametrize("name", DROPPING)
def test_the_start_is_the_identity_in_training_too(name: str) -> None:
    model, _ = adapted(DROPPING[name])
    with ll.disabled(model):
        base = model(X)
    assert torch.equal(model.train()(X), base)
    assert torch.equal(model.eval()(X), base)


@pytest.mark.parametrize(
    "name", [name if name in ("lora", "eva") else pytest.param(name, marks=pytest.mark.slow) for name in DROPPING]
)
def test_evaluation_drops_nothing_and_training_averages_to_it(name: str) -> None:
    """Every draw is another one; their mean is the output of evaluation, for these methods are affine in x."""
    model, adapter = adapted(DROPPING[name])
    moved(adapter)
    expected = model.eval()(X).detach()
    model.train()
    with torch.no_grad():
        draws = torch.stack([seeded(model, seed) for seed in range(3000)])
    assert torch.equal(seeded(model, 5), draws[5])
    assert not torch.allclose(draws[0], draws[1])
    error = (draws.mean(0) - expected).abs() / (draws.std(0) / len(draws) ** 0.5 + 1e-9)
    assert float(error.mean()) < 1.2  # of a normal deviate it is 0.8
    assert float(error.max()) < 6


@pytest.mark.parametrize("name", DROPPING)
def test_merging_does_not_see_it(name: str) -> None:
    model, adapter = adapted(DROPPING[name])
    moved(adapter)
    expected = model.eval()(X)
    model.train()
    ll.merge(model)
    torch.testing.assert_close(model(X), expected)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_peft_computes_the_same_from_the_same_draw_and_reads_it(name: str, tmp_path: Path) -> None:
    model, adapter = adapted(DROPPING[name])
    base = copy.deepcopy(model)
    ll.detach(base)
    moved(adapter)
    ll.export_peft(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True)
    assert theirs.peft_config["default"].lora_dropout == 0.4  # type: ignore[attr-defined]
    for mode in (True, False):
        torch.testing.assert_close(seeded(model.train(mode)), seeded(theirs.train(mode)), rtol=1e-6, atol=1e-6)
    again = nn.Sequential(nn.Linear(24, 20, dtype=torch.float64))
    back = ll.import_peft(again, tmp_path / "adapter")
    assert back.layers()["0"].cfg.dropout == 0.4


def test_gradients_are_those_of_the_layer_on_the_dropped_input() -> None:
    model, adapter = adapted(DROPPING["lora"])
    moved(adapter)
    layer: Any = model[0]
    torch.manual_seed(7)
    seen = torch.nn.functional.dropout(X, 0.4)
    expected = X @ layer.weight.T + layer.bias + 2.0 * seen @ layer.lora_A.T @ layer.lora_B.T
    wanted = torch.autograd.grad(expected.square().sum(), [layer.lora_A, layer.lora_B])
    torch.manual_seed(7)
    got = torch.autograd.grad(model.train()(X).square().sum(), [layer.lora_A, layer.lora_B])
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("value", [1, -0.1, "0.1", True, float("nan")])
def test_bad_values_are_refused(value: Any) -> None:
    with pytest.raises(ll.ConfigError, match=r"LoRAConfig\(dropout=.*\): dropout is a number from 0 to below 1"):
        ll.LoRAConfig(dropout=value)


@pytest.mark.parametrize(("start", "gram"), [("orthogonal", 1.0), ("gaussian", 24 / 16), ("kaiming_uniform", 1 / 3)])
def test_starts_of_lora(start: str, gram: float) -> None:
    """The mean square length of A's rows: 1, d_in / r², and d_in · (1/√d_in)² / 3."""
    model = nn.Sequential(*(nn.Linear(24, 24) for _ in range(50)))
    adapter = ll.attach(model, ll.LoRAConfig(r=4, init=start))
    A = torch.stack([target.params["lora_A"] for target in adapter.layers().values()]).detach()
    assert float((A @ A.mT).diagonal(dim1=1, dim2=2).mean()) == pytest.approx(gram, rel=0.05)
    if start == "orthogonal":
        torch.testing.assert_close(A @ A.mT, torch.eye(4).expand(50, 4, 4), atol=1e-5, rtol=0)


def test_an_unknown_start() -> None:
    with pytest.raises(ll.ConfigError, match=r"LoRAConfig\(init='normal'\): A starts as one of 'kaiming_uniform', 'g"):
        ll.LoRAConfig(init="normal")
