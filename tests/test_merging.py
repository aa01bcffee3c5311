"""merge and merged: the adapted layer as plain weights, for every variant that is affine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import lora_lite as ll

from .models import net, token_ids, train, weights_hash
from .test_variants import VARIANTS, config


def trained(name: str, dtype: torch.dtype = torch.float32, bias: bool = False) -> tuple[nn.Module, torch.Tensor]:
    """A small stack with an adapter that has moved, and inputs; its last layer has no bias."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64, bias=bias)).to(dtype)
    x = torch.randn(10, 64, dtype=dtype)
    adapter = ll.attach(model, config(name), calibration_data=[x.repeat(12, 1)] if name == "eva" else None)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model, x


@pytest.mark.parametrize("name", VARIANTS)
def test_merge_computes_the_same(name: str) -> None:
    model, x = trained(name)
    expected = model(x).detach()
    keys = {key for key in model.state_dict() if "lora_" not in key}
    ll.merge(model)
    got = model(x).detach()
    assert float((got - expected).norm() / expected.norm()) < 1e-6
    assert set(model.state_dict()) == keys
    assert not ll.adapters(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert not any("lora" in key for m in model.modules() for key in vars(m))


@pytest.mark.parametrize("name", VARIANTS)
def test_in_bfloat16_it_is_the_exact_weight_rounded_once(name: str) -> None:
    model, _ = trained(name, torch.bfloat16)
    exact = trained(name, torch.bfloat16)[0].double()
    if name != "eva":  # its directions come from the data in bfloat16
        assert all(
            torch.equal(a.double(), b)
            for (_, a), (_, b) in zip(model.named_parameters(), exact.named_parameters(), strict=True)
        )
    ll.merge(exact)
    ll.merge(model)
    for layer, reference in ((model[0], exact[0]), (model[2], exact[2])):
        assert torch.equal(layer.weight, reference.weight.to(torch.bfloat16))


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "hra", "pissa"])
def test_merged_puts_everything_back(name: str) -> None:
    model, x = trained(name)
    adapted = model(x)
    before = weights_hash(model)
    parameters = dict(model.named_parameters())
    with ll.merged(model):
        torch.testing.assert_close(model(x), adapted, rtol=1e-5, atol=1e-5)
        assert not torch.equal(model[0].weight, parameters["0.weight"])
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[key] for key, p in model.named_parameters())
    assert weights_hash(model) == before
    assert torch.equal(model(x), adapted)
    with pytest.raises(RuntimeError, match="inside"), ll.merged(model):
        raise RuntimeError("inside")
    assert torch.equal(model(x), adapted)


def test_a_shift_on_a_layer_without_bias_becomes_a_bias(registered: Any, toy: SimpleNamespace) -> None:
    registered(toy, name="toy")
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    adapter = ll.attach(model, toy.Config())
    x = torch.randn(3, 6)
    with ll.merged(model):
        assert model[0].bias is None
    next(adapter.parameters()).data.normal_()
    expected = model(x)
    with ll.merged(model):
        torch.testing.assert_close(model(x), expected)
    assert model[0].bias is None
    ll.merge(model)
    torch.testing.assert_close(model(x), expected)
    assert isinstance(model[0].bias, nn.Parameter)


def test_two_adapters(tmp_path: Any) -> None:
    model = net()
    first = ll.attach(model, ll.LoRAConfig(r=2, target_names=("q_proj", "up_proj")), name="first")
    second = ll.attach(model, ll.IA3Config(target_names=("up_proj", "v_proj")), name="second")
    third = ll.attach(model, ll.LoRAConfig(r=2, target_names=("down_proj",)), name="third")
    for adapter in (first, second, third):
        train(model, adapter)
    expected = model(token_ids())
    with pytest.raises(ll.MergeError, match=r"layers.0.up_proj carries adapter 'second', too.*all of them together"):
        ll.merge(model, "first")
    ll.merge(model, "third")
    assert list(ll.adapters(model)) == ["first", "second"]
    assert not model.layers[0].down_proj.weight.requires_grad
    torch.testing.assert_close(model(token_ids()), expected, rtol=1e-4, atol=1e-5)
    ll.merge(model)
    torch.testing.assert_close(model(token_ids()), expected, rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad for p in model.parameters())


def test_what_is_not_affine_is_refused_with_the_residual(registered: Any, toy: SimpleNamespace) -> None:
    toy.forward = ll.hookimpl(lambda y, params: y + params["lora_h"] * torch.tanh(y))
    registered(toy, name="toy")
    model = nn.Sequential(nn.Linear(6, 4))
    adapter = ll.attach(model, toy.Config())
    next(adapter.parameters()).data.fill_(1e-3)
    before = weights_hash(model)
    with pytest.raises(
        ll.MergeError, match=r"0 with 'default' \(toy\) is not affine in its input: .* off by \d\.\de-0\d"
    ):
        ll.merge(model)
    assert weights_hash(model) == before
    assert list(ll.adapters(model)) == ["default"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    model, _ = trained("lora")
    model[2].lora_B.data[0, 0] = value
    before = weights_hash(model)
    for call in (lambda: ll.merge(model), lambda: ll.merged(model).__enter__()):
        with pytest.raises(
            ll.MergeError, match="lora_B of adapter 'default' on 2 holds NaN or infinity; nothing was written"
        ):
            call()
    assert weights_hash(model) == before


def test_what_overflows_is_refused() -> None:
    model, _ = trained("lora", torch.float16)
    model[2].lora_A.data.fill_(10)
    model[2].lora_B.data.fill_(6e4)
    with pytest.raises(ll.MergeError, match=r"2 with 'default' \(lora\) does not fit torch.float16"):
        ll.merge(model)


def test_tied_weights_are_refused() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
    model["head"].weight = model["embed"].weight
    ll.attach(model, ll.LoRAConfig(r=2, target_names=("head",), exclude_names=()))
    with pytest.raises(ll.MergeError, match="the weight of head is also that of embed"):
        ll.merge(model)


def test_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(12, 8))
    adapter = ll.attach(model, ll.DoRAConfig(r=2))
    for p in adapter.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    x = torch.randn(3, 8)
    expected = model(x)
    ll.merge(model)
    assert model[0].weight.shape == (8, 12)
    torch.testing.assert_close(model(x), expected)


def test_a_layer_that_does_more_than_multiply() -> None:
    class Loud(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Loud(6, 4))
    ll.attach(model, ll.LoRAConfig(r=2))
    with pytest.raises(ll.MergeError, match=r"0 \(Loud\) computes more than weight times input"):
        ll.merge(model)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_layers_are_refused_or_replaced(kind: str) -> None:
    from .test_quantised import layer

    pytest.importorskip("bitsandbytes")
    model = nn.Sequential(layer(kind))
    adapter = ll.attach(model, ll.LoRAConfig(r=4))
    for p in adapter.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    x = torch.randn(5, 64)
    expected = model(x)
    quantised = model[0]
    with pytest.raises(ll.MergeError, match=rf"0 \(bnb-{kind}\) does not hold a plain dense weight.*to_dense=True"):
        ll.merge(model)
    assert model[0] is quantised
    ll.merge(model, to_dense=True)
    assert type(model[0]) is nn.Linear
    assert float(((model(x) - expected).norm() / expected.norm()).detach()) < 2e-2


def test_parametrised_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), nn.Linear(4, 6))
    adapter = ll.attach(model, ll.LoRAConfig(r=2))
    for p in adapter.parameters():
        p.data.normal_()
    x = torch.randn(3, 6)
    expected = model(x)
    with pytest.raises(ll.MergeError, match="0 .* does not hold a plain dense weight"):
        ll.merge(model)
    ll.merge(model, to_dense=True)
    torch.testing.assert_close(model(x), expected)


def test_states_in_which_it_is_refused() -> None:
    model, _ = trained("lora")
    with (
        ll.disabled(model),
        pytest.raises(ll.ModelStateError, match=r"not inside `with disabled\(model\)`: leave that block first"),
    ):
        ll.merge(model)
    with pytest.raises(ll.AdapterNameError, match="no adapter is called 'defualt'; did you mean 'default'"):
        ll.merge(model, "defualt")
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(4, 4))
    ll.attach(empty, ll.LoRAConfig(r=2))
    with pytest.raises(ll.ModelStateError, match="adapter 'default' has no values yet"):
        ll.merge(empty)


def test_under_autocast_it_is_as_exact() -> None:
    model, _ = trained("lora", bias=True)
    twin, _ = trained("lora", bias=True)
    ll.merge(twin)
    with torch.autocast("cpu", torch.bfloat16):
        ll.merge(model)
    assert torch.equal(model[2].bias, twin[2].bias)
    assert torch.equal(model[2].weight, twin[2].weight)


def test_a_layer_that_stands_in_two_places() -> None:
    torch.manual_seed(0)
    shared = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    model = nn.Sequential(shared, nn.Tanh(), shared)
    adapter = ll.attach(model, ll.LoRAConfig(r=2))
    for p in adapter.parameters():
        p.data.normal_()
    x = torch.randn(3, 6)
    expected = model(x)
    ll.merge(model, to_dense=True)
    assert model[0] is model[2]
    torch.testing.assert_close(model(x), expected)


def test_hooks_of_the_user_are_not_lost() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)))
    model[0].register_forward_hook(lambda layer, args, y: y)
    ll.attach(model, ll.LoRAConfig(r=2))
    with pytest.raises(ll.MergeError, match="0 has hooks or a forward of its own"):
        ll.merge(model, to_dense=True)


def test_a_model_that_moves_while_it_is_merged() -> None:
    model, x = trained("lora")
    expected = model(x)
    with ll.merged(model):
        model.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    torch.testing.assert_close(model(x.double()), expected.double(), rtol=1e-5, atol=1e-5)


# --- hooks of the user on an adapted layer: merged only where the merged weight computes the same -----------------


def halve_input(layer: nn.Module, args: tuple[Any, ...]) -> Any:
    return (torch.tanh(args[0]),)


def square_output(layer: nn.Module, args: tuple[Any, ...], y: torch.Tensor) -> torch.Tensor:
    return y * y.abs()


def hook_on(layer: nn.Module, side: str) -> None:
    if side == "input":
        layer.register_forward_pre_hook(halve_input)
    else:
        layer.register_forward_hook(square_output)


@pytest.mark.parametrize("name", ["lora", "hra", "ia3_ff", "oft", "dora"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_beside_a_hook_it_computes_the_same_or_is_refused(name: str, when: str, side: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(10, 64)
    if when == "before":
        hook_on(model[0], side)
    adapter = ll.attach(model, config(name))
    if when == "after":
        hook_on(model[0], side)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.05 * torch.randn_like(p))
        expected = model(x)
        variant = ll.get_variant(name)
        between = side == "input" and when == "after" and variant.forward_input is not None
        between |= side == "output" and when == "before" and variant.forward is not None
        if between:
            for use in (lambda: ll.merge(model), lambda: ll.merged(model).__enter__()):
                with pytest.raises(ll.MergeError, match=r"0 has a hook that is not ours \((halve|square)_"):
                    use()
            assert torch.equal(model(x), expected)
            return
        with ll.merged(model):
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        ll.merge(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_a_fresh_adapter_that_says_it_is_not_affine_is_refused(registered: Any, toy: SimpleNamespace) -> None:
    toy.AFFINE = False
    registered(toy, name="toy")
    model = net()
    ll.attach(model, toy.Config())
    with pytest.raises(ll.MergeError, match=r"as the variant says of itself \(AFFINE = False\)"):
        ll.merge(model)


def test_merging_does_not_depend_on_the_mode_and_leaves_it() -> None:
    for training in (True, False):
        model, _ = trained("lora")
        model.train(training)
        ll.merge(model)
        assert model.training is training
        assert model[0].training is training
