"""FISH Mask: which entries it chooses, by a backward pass for each batch, and what it computes with them."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll
from tests.oracles import assert_same


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()


def batches() -> list[Tensor]:
    return [torch.randn(1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]


def information(model: nn.Module, loss: Any) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for batch in batches():
        model.zero_grad()
        loss(model(batch)).backward()
        for name in ("0", "2"):
            gradient = model.get_submodule(name).weight.grad.clone()
            total[name] = total.get(name, 0) + gradient**2
    return total


def chosen(adapter: ll.Adapter) -> dict[str, set[int]]:
    return {name: {*target.params["lora_places"].tolist()} for name, target in adapter.layers().items()}


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 1.0])
def test_the_largest_of_all_layers(share: float) -> None:
    F_ = information(net(), lambda y: y.square().mean())
    ranked = sorted(((-float(v), name, i) for name in F_ for i, v in enumerate(F_[name].flatten())))
    best = ranked[: max(1, round(share * 88))]
    expected = {name: {i for _, one, i in best if one == name} for name in F_}
    adapter = ll.attach(net(), ll.FishMaskConfig(share=share), calibration_data=batches())
    assert chosen(adapter) == {name: places for name, places in expected.items() if places}
    assert sum(p.numel() for p in adapter.parameters()) == max(1, round(share * 88))


def test_a_layer_without_any_is_left_out() -> None:
    model = net()
    model[0].weight.data *= 1e-3
    model[2].weight.data *= 1e-6  # so that little reaches the first
    adapter = ll.attach(model, ll.FishMaskConfig(share=0.1), calibration_data=batches())
    assert adapter.targets == ("2",)


def test_so_many_of_every_layer() -> None:
    F_ = information(net(), lambda y: y.square().mean())
    adapter = ll.attach(net(), ll.FishMaskConfig(count=7), calibration_data=batches())
    assert chosen(adapter) == {name: {*F_[name].flatten().topk(7).indices.tolist()} for name in F_}


def test_the_models_own_loss() -> None:
    class Model(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            return types.SimpleNamespace(loss=super().forward(x).exp().sum())

    F_ = information(net(), lambda y: y.exp().sum())
    adapter = ll.attach(Model(*net()), ll.FishMaskConfig(count=9), calibration_data=batches())
    assert chosen(adapter) == {name: {*F_[name].flatten().topk(9).indices.tolist()} for name in F_}


def test_formula() -> None:
    torch.manual_seed(0)
    layer: Any = nn.Linear(6, 8).double()
    adapter = ll.attach(nn.Sequential(layer), ll.FishMaskConfig(share=0.4), calibration_data=batches())
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    values = layer.lora_values.detach().clone().requires_grad_()
    change = torch.zeros(8, 6, dtype=torch.float64)
    for value, place in zip(values, layer.lora_places.tolist(), strict=True):
        one = torch.zeros_like(change)
        one[place // 6, place % 6] = 1
        change = change + value * one
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert_same(layer, x, F.linear(x, layer.weight + change, layer.bias), {"lora_values": values})


def test_a_file_keeps_each_layers_own_number(tmp_path: Path) -> None:
    model = net()
    adapter = ll.attach(model, ll.FishMaskConfig(share=0.2), calibration_data=batches())
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    assert len({len(places) for places in chosen(adapter).values()}) == 2
    ll.save(model, tmp_path / "file.safetensors")
    other = net()
    again = ll.load(other, tmp_path / "file.safetensors")
    assert chosen(again) == chosen(adapter)
    assert torch.equal(other(batches()[0]), model(batches()[0]))


def test_refusals() -> None:
    with pytest.raises(ll.CalibrationError):
        ll.attach(net(), ll.FishMaskConfig())

    class Silent(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            return {"logits": super().forward(x)}

    with pytest.raises(ll.CalibrationError, match="holds no loss: give batches with labels"):
        ll.attach(Silent(*net()), ll.FishMaskConfig(), calibration_data=batches())
    for wrong in ({"share": 0}, {"share": 1.5}, {"count": 0}):
        with pytest.raises(ll.ConfigError, match="a share above 0 and at most 1, and a count of at least 1 or None"):
            ll.FishMaskConfig(**wrong)  # type: ignore[arg-type]
