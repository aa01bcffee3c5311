"""collect_gradients: what fine-tuning the dense weights would see, on any base and without touching it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll

from .models import LINEAR_LAYERS, net, snapshot, token_ids

BATCHES = [token_ids(number) for number in range(3)]


def loss_of(output: Tensor, batch: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), batch.flatten())


def by_autograd(model: nn.Module) -> dict[str, Tensor]:
    for batch in BATCHES:
        (loss_of(model(batch), batch) / len(BATCHES)).backward()
    found = {name: model.get_submodule(name).weight.grad for name in LINEAR_LAYERS}
    return {name: gradient.clone() for name, gradient in found.items() if isinstance(gradient, Tensor)}


def collecting(found: dict[str, Tensor], **options: Any) -> SimpleNamespace:
    """A variant that collects at the start."""

    class Config(ll.AdapterConfig):
        variant = "collecting"

    @ll.hookimpl
    def param_specs(d_out: int) -> dict[str, ll.ParamSpec]:
        return {"lora_h": ll.ParamSpec((d_out,))}

    @ll.hookimpl
    def group_init(model: nn.Module, targets: Any, calibration_data: Any) -> None:
        found.update(ll.collect_gradients(model, targets, calibration_data, **options))

    @ll.hookimpl
    def forward(y: Tensor, params: dict[str, Tensor]) -> Tensor:
        return y + params["lora_h"].to(y.dtype)

    return SimpleNamespace(Config=Config, param_specs=param_specs, group_init=group_init, forward=forward)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_they_are_those_of_autograd(frozen: bool, training: bool, registered: Any) -> None:
    expected = by_autograd(net().double())
    model, found = net().double().requires_grad_(not frozen).train(training), dict[str, Tensor]()
    before = snapshot(model)
    variant = collecting(found, loss=loss_of)
    registered(variant, name="collecting")
    ll.attach(model, variant.Config(), calibration_data=BATCHES)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    assert all(p.grad is None for p in model.parameters())
    ll.detach(model)
    assert snapshot(model) == before


def test_beside_another_adapter_and_in_bfloat16(registered: Any) -> None:
    model, found = net(torch.bfloat16), dict[str, Tensor]()
    other = ll.attach(model, ll.LoRAConfig(r=2), name="other")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    variant = collecting(found, loss=loss_of)
    registered(variant, name="collecting")
    ll.attach(model, variant.Config(), name="new", calibration_data=BATCHES)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert all(p.grad is None for p in model.parameters())
    dense = net()
    ll.attach(dense, ll.LoRAConfig(r=2), name="other")
    with torch.no_grad():
        for parameter in ll.adapters(dense)["other"].parameters():
            parameter.add_(0.1)
    for name in LINEAR_LAYERS:
        dense.get_submodule(name).weight.requires_grad_(True)
    for name, gradient in by_autograd(dense).items():
        assert float((found[name] - gradient).norm() / gradient.norm()) < 0.05, name


def test_on_a_quantised_base(registered: Any) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Sequential(bnb.nn.Linear4bit(64, 64), nn.Tanh(), bnb.nn.Linear4bit(64, 64)).to("cpu")
    dense = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    for name in ("0", "2"):
        layer: Any = dense.get_submodule(name)
        layer.weight.data = ll.dense_weight(model.get_submodule(name)).float().clone()
        layer.bias.data = model.get_submodule(name).bias.data.float().clone()  # type: ignore[union-attr]
    x, found = torch.randn(8, 64), dict[str, Tensor]()
    variant = collecting(found, loss=lambda y, _: y.square().mean())
    registered(variant, name="collecting")
    ll.attach(model, variant.Config(), calibration_data=[x])
    dense(x).square().mean().backward()
    for name in ("0", "2"):
        expected = dense.get_submodule(name).weight.grad
        assert isinstance(expected, Tensor)
        assert float((found[name] - expected).norm() / expected.norm()) < 0.05


class WithLoss(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.layer, self.output = nn.Linear(4, 4), output

    def forward(self, x: Tensor) -> Any:
        return self.output(self.layer(x).square().mean())


@pytest.mark.parametrize("output", [
    lambda loss: loss, lambda loss: {"loss": loss}, lambda loss: SimpleNamespace(loss=loss, logits=None)
])  # fmt: skip
def test_where_the_loss_is_found(output: Any, registered: Any) -> None:
    found: dict[str, Tensor] = {}
    variant = collecting(found)
    registered(variant, name="collecting")
    model = WithLoss(output)
    ll.attach(model, variant.Config(), calibration_data=[torch.ones(3, 4)])
    assert found["layer"].shape == (4, 4)


def test_what_is_missing_is_said(registered: Any) -> None:
    variant = collecting({})
    registered(variant, name="collecting")
    with pytest.raises(ll.CalibrationError, match="the model's Tensor holds no loss: give batches with labels"):
        ll.attach(net(), variant.Config(), calibration_data=BATCHES)
    with pytest.raises(ll.CalibrationError, match="collect_gradients got no batch"):
        ll.attach(net(), variant.Config(), calibration_data=[])
    variant = collecting({}, loss=lambda output, batch: torch.zeros(()))
    registered(variant, name="collecting")
    with pytest.raises(ll.CalibrationError, match="the loss does not depend on any target"):
        ll.attach(net(), variant.Config(), calibration_data=BATCHES)
    half = collecting({}, loss=lambda output, batch: output.sum())
    registered(half, name="collecting")
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model.forward = lambda x: model["a"](x)  # type: ignore[method-assign]
    with pytest.raises(ll.CalibrationError, match=r"no gradient of the loss reached b \(1 layers in all\)"):
        ll.attach(model, half.Config(), calibration_data=[torch.ones(2, 4)])


def test_a_gradient_that_is_not_finite_is_an_error(registered: Any) -> None:
    variant = collecting({}, loss=lambda output, batch: output.sum() * float("nan"))
    registered(variant, name="collecting")
    with pytest.raises(
        ll.CalibrationError, match=r"the gradient of the loss at layers\.\d.* has nan or inf \(10 layers"
    ):
        ll.attach(net(), variant.Config(), calibration_data=BATCHES)
