"""SSF, RED and BitFit against their formulas, BitFit also against the peft package's BEFT."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll
from tests.models import net
from tests.oracles import D_IN, D_OUT, assert_parity, assert_same, filled, peft_twin


class Branch(nn.Module):
    """A model with a residual feed-forward block, for methods that go behind one."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.Tanh(), nn.Linear(2 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


def own(layer: Any, *names: str) -> dict[str, Tensor]:
    return {name: getattr(layer, name).detach().clone().requires_grad_() for name in names}


@pytest.mark.parametrize("bias", [True, False])
def test_ssf_is_a_scaled_weight_and_another_bias(bias: bool) -> None:
    layer, x = filled(ll.SSFConfig(), bias=bias)
    names = own(layer, "lora_g", "lora_shift")
    gate = 1 + names["lora_g"]
    shift = names["lora_shift"] + (gate * layer.bias if bias else 0)
    assert_same(layer, x, F.linear(x, gate[:, None] * layer.weight, shift), names)


@pytest.mark.parametrize("bias", [True, False])
def test_bitfit_is_another_bias(bias: bool) -> None:
    layer, x = filled(ll.BitFitConfig(), bias=bias)
    names = own(layer, "lora_shift")
    shift = names["lora_shift"] + (layer.bias if bias else 0)
    assert_same(layer, x, F.linear(x, layer.weight, shift), names)


def test_red_scales_and_shifts_behind_the_feed_forward() -> None:
    torch.manual_seed(0)
    model = Branch(6).double()
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    hidden = copy.deepcopy(model.mlp)(x)
    adapter = ll.attach(model, ll.REDConfig())
    assert list(adapter.targets) == ["mlp"]
    assert torch.equal(model(x), x + hidden)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    names = own(model.mlp, "lora_g", "lora_shift")
    expected = hidden * torch.diag(1 + names["lora_g"]).diagonal() + names["lora_shift"]
    assert_same(model.mlp, x, expected, names)
    with pytest.raises(ll.MergeError, match="is a whole block, which has no weight"):
        ll.merge(model)


def test_red_is_ssf_on_the_last_layer() -> None:
    torch.manual_seed(0)
    models = [Branch(6).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ll.attach(models[0], ll.REDConfig())
    ll.attach(models[1], ll.SSFConfig(target_names=(r"mlp\.2$",)))
    for name in ("lora_g", "lora_shift"):
        value = torch.randn(6, dtype=torch.float64)
        getattr(models[0].mlp, name).data.copy_(value)
        getattr(models[1].mlp[2], name).data.copy_(value)
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = models[0](x)
    torch.testing.assert_close(models[1](x), expected, rtol=0, atol=1e-12)
    ll.merge(models[1])
    torch.testing.assert_close(models[1](x), expected, rtol=0, atol=1e-12)


def test_red_on_the_models_blocks() -> None:
    model = net()
    with pytest.raises(ll.UnsupportedLayer, match="variant 'red' serves block"):
        ll.attach(model, ll.REDConfig(target_names=(r"layers\.0$", "q_proj")))
    assert list(ll.attach(model, ll.REDConfig(target_names=())).targets) == ["layers.0", "layers.1"]


@pytest.mark.parametrize(("cfg", "count"), [(ll.SSFConfig(), 2 * D_OUT), (ll.BitFitConfig(), D_OUT)])
def test_counts_and_liveness(cfg: ll.AdapterConfig, count: int) -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    adapter = ll.attach(model, cfg)
    assert sum(p.numel() for p in adapter.parameters()) == count
    model(torch.randn(3, D_IN)).square().sum().backward()
    assert all(bool((p.grad != 0).all()) for p in adapter.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in adapter.parameters())


def test_small_offsets_survive_bfloat16_activations() -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT)).bfloat16()
    adapter = ll.attach(model, ll.SSFConfig())
    x = torch.randn(200, D_IN).bfloat16()
    before = model(x)
    adapter.layers()["0"].params["lora_g"].data.fill_(3e-3)  # 1 + 3e-3 is 1 in bfloat16
    assert float((model(x) != before).float().mean()) > 0.3


def test_a_layer_without_a_bias_gets_one_when_merged() -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT, bias=False)).double()
    nn.init.normal_(ll.attach(model, ll.BitFitConfig()).layers()["0"].params["lora_shift"])
    x = torch.randn(5, D_IN, dtype=torch.float64)
    expected = model(x)
    ll.merge(model)
    assert model[0].bias is not None
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_bitfit_is_beft_of_peft() -> None:
    peft = pytest.importorskip("peft")
    layer, x = filled(ll.BitFitConfig(), torch.float32)
    theirs, inner = peft_twin(layer, peft.BeftConfig(target_modules=["0"]))
    shift = inner.beft_bias["default"]
    shift.data = layer.lora_shift.data[None].clone()
    assert_parity(layer, x, theirs, [(layer.lora_shift, shift)])
