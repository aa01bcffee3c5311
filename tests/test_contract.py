"""What a wrong variant module gets: BrokenPlugin with the name of the thing and what to write instead."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_lite as ll
from lora_lite_core.contract.hookspecs import hookimpl

from .models import net, snapshot, token_ids


def refused(registered: Any, namespace: Any, name: str = "toy") -> str:
    with pytest.raises(ll.BrokenPlugin) as caught:
        registered(namespace, name=name)
    assert name not in ll.list_variants()
    return str(caught.value)


def test_a_correct_namespace_is_a_variant(registered: Any, toy: SimpleNamespace) -> None:
    registered(toy, name="toy")
    assert "toy" in ll.list_variants()
    assert ll.list_variants("toy")[0].distribution == "(registered)"
    assert ll.list_variants("toy")[0].summary == "Toy: y + h."
    model = net()
    before = model(token_ids())
    ll.attach(model, ll.ToyConfig())
    assert torch.equal(model(token_ids()), before)


def test_a_class_with_static_methods_is_a_variant(registered: Any, toy: SimpleNamespace) -> None:
    class Shift:
        """Shift: a class instead of a module."""

        Config = toy.Config
        param_specs = staticmethod(toy.param_specs)
        forward = staticmethod(toy.forward)

    registered(Shift, name="toy")
    assert ll.get_variant("toy").forward is not None


def test_misspelled_hook(registered: Any, toy: SimpleNamespace) -> None:
    toy.forwrad = toy.forward
    del toy.forward
    toy.forwrad = hookimpl(lambda y, params: y)
    assert "variant 'toy' (toy): no hook is called 'forwrad'; did you mean 'forward'?" in refused(registered, toy)


def test_keyword_only_parameter(registered: Any, toy: SimpleNamespace) -> None:
    @hookimpl
    def forward(y: Tensor, *, params: dict[str, Tensor]) -> Tensor:
        return y

    toy.forward = forward
    message = refused(registered, toy)
    assert (
        "parameter 'params' of forward is keyword-only and would never be passed; make it a plain parameter" in message
    )
    assert "arguments of forward: x, y, params, cfg, layer" in message


@pytest.mark.parametrize("starred", [lambda y, *rest: y, lambda y, **rest: y])
def test_starred_parameter(registered: Any, toy: SimpleNamespace, starred: Any) -> None:
    toy.forward = hookimpl(starred)
    assert "parameter 'rest' of forward is starred and would never be passed" in refused(registered, toy)


def test_default_is_never_passed(registered: Any, toy: SimpleNamespace) -> None:
    toy.forward = hookimpl(lambda y, params, cfg=None: y)
    assert "parameter 'cfg' of forward is given a default and would never be passed" in refused(registered, toy)


def test_lost_marker(registered: Any, toy: SimpleNamespace) -> None:
    toy.init = lambda params: None
    assert "init has no @hookimpl above it and would be ignored; mark it, or rename it" in refused(registered, toy)


def test_unknown_argument(registered: Any, toy: SimpleNamespace) -> None:
    toy.forward = hookimpl(lambda x, y, weight: y)
    message = refused(registered, toy)
    assert "weight" in message
    assert "arguments of forward: x, y, params, cfg, layer" in message


@pytest.mark.parametrize(("given", "meant"), [("config", "cfg"), ("parameters", "params"), ("layers", "layer")])
def test_an_argument_of_another_name_gets_a_suggestion(
    given: str, meant: str, registered: Any, toy: SimpleNamespace
) -> None:
    toy.forward = hookimpl(eval(f"lambda x, y, {given}: y"))
    message = refused(registered, toy)
    assert f"forward has no argument '{given}'; did you mean '{meant}'?\n" in message
    assert "arguments of forward: x, y, params, cfg, layer" in message


def test_hook_wrapper(registered: Any, toy: SimpleNamespace) -> None:
    @hookimpl(wrapper=True)
    def forward(y: Tensor) -> Any:
        return (yield)

    toy.forward = forward
    assert "forward is a hook wrapper" in refused(registered, toy)


def test_nothing_to_run(registered: Any, toy: SimpleNamespace) -> None:
    del toy.forward
    assert "a variant needs param_specs and at least one of forward, forward_input" in refused(registered, toy)


def test_no_config(registered: Any, toy: SimpleNamespace) -> None:
    del toy.Config
    assert "has no Config; write a dataclass of AdapterConfig or LowRankConfig" in refused(registered, toy)


def test_config_of_another_name(registered: Any, toy: SimpleNamespace) -> None:
    assert "Config.variant is 'toy'; write `variant = 'other'`" in refused(registered, toy, "other")


def test_config_without_dataclass(registered: Any, toy: SimpleNamespace) -> None:
    class Config(ll.AdapterConfig):
        variant = "toy"
        strength: float = 1.0

    toy.Config = Config
    message = refused(registered, toy)
    assert (
        "Config declares strength without being a dataclass; put @dataclass(frozen=True, kw_only=True) above it"
        in message
    )


def test_one_module_under_two_names(registered: Any, toy: SimpleNamespace) -> None:
    registered(toy, name="toy")

    @dataclass(frozen=True, kw_only=True)
    class Config(ll.AdapterConfig):
        variant = "toy2"

    toy.Config = Config
    assert "is already registered as 'toy'; one module is one variant" in refused(registered, toy, "toy2")


@pytest.mark.parametrize(
    ("constant", "value", "message"),
    [
        ("IDENTITY_ATOL", -1, "IDENTITY_ATOL is -1; give a number from 0"),
        (
            "BENCH",
            {"lr": "fast"},
            r"BENCH is {'lr': 'fast'}; give a learning rate for AdamW, steps, or both, as in BENCH",
        ),
        ("BENCH", {"lr": 0}, "BENCH is {'lr': 0}; give a learning rate"),
        ("BENCH", {"steps": 1.5}, "BENCH is {'steps': 1.5}; give a learning rate"),
        ("BENCH", {"rate": 1}, "BENCH is {'rate': 1}; give a learning rate"),
        ("IDENTITY_ATOL", 1e-6, "IDENTITY_ATOL = 1e-06 needs an IDENTITY_REASON"),
        ("AFFINE", "yes", "AFFINE is 'yes'; give True or False"),
    ],
)
def test_constants(registered: Any, toy: SimpleNamespace, constant: str, value: object, message: str) -> None:
    setattr(toy, constant, value)
    assert message in refused(registered, toy)


def test_registering_again_replaces(registered: Any, toy: SimpleNamespace) -> None:
    registered(toy, name="toy")
    second = SimpleNamespace(**vars(toy))
    registered(second, name="toy")
    assert ll.get_variant("toy").namespace is second


def test_an_installed_name_cannot_be_registered(toy: SimpleNamespace) -> None:
    with pytest.raises(
        ll.AmbiguousVariant, match="variant 'lora' is provided by lora-lite-lora; register yours under another name"
    ):
        ll.register(toy, name="lora")


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (lambda d_out: {"h": ll.ParamSpec((d_out,))}, "names a tensor 'h'; names start with lora_"),
        (lambda d_out: {"lora__h": ll.ParamSpec((d_out,))}, "names a tensor 'lora__h'; names start with lora_"),
        (lambda d_out: {}, "returned no tensor"),
        (lambda d_out: {"lora_h": (d_out,)}, "return a dict of name: ParamSpec(…)"),
        (lambda d_out: None, "return a dict of name: ParamSpec(…)"),
    ],
)
def test_wrong_specs(registered: Any, toy: SimpleNamespace, specs: Any, message: str) -> None:
    toy.param_specs = hookimpl(specs)
    registered(toy, name="toy")
    model = net()
    before = snapshot(model)
    with pytest.raises(ll.BrokenPlugin) as caught:
        ll.attach(model, toy.Config())
    assert message in str(caught.value)
    assert "param_specs of variant 'toy' for layers.0.self_attn.q_proj" in str(caught.value)
    assert snapshot(model) == before


def test_a_layer_that_the_variant_refuses_is_named(registered: Any, toy: SimpleNamespace) -> None:
    @hookimpl
    def param_specs(d_out: int) -> dict[str, ll.ParamSpec]:
        if d_out == 24:
            raise ll.UnsupportedLayer("Toy: 24 outputs are too many; use exclude_names")
        return {"lora_h": ll.ParamSpec((d_out,))}

    toy.param_specs = param_specs
    registered(toy, name="toy")
    model = net()
    before = snapshot(model)
    with pytest.raises(ll.UnsupportedLayer) as caught:
        ll.attach(model, toy.Config())
    assert str(caught.value) == "layers.0.up_proj: Toy: 24 outputs are too many; use exclude_names"
    assert snapshot(model) == before


def test_init_that_replaces_instead_of_filling(registered: Any, toy: SimpleNamespace) -> None:
    @hookimpl
    def init(params: dict[str, Tensor]) -> None:
        params["lora_h"] = torch.zeros(3)

    toy.init = init
    registered(toy, name="toy")
    model = net()
    before = snapshot(model)
    with pytest.raises(ll.BrokenPlugin, match=r"init of variant 'toy' replaced params\['lora_h'\]; fill it in place"):
        ll.attach(model, toy.Config())
    assert snapshot(model) == before


def test_init_that_returns_instead_of_filling(registered: Any, toy: SimpleNamespace) -> None:
    draw = lambda tensor, generator: torch.randn(tensor.shape, generator=generator)  # noqa: E731
    toy.param_specs = hookimpl(lambda d_out: {"lora_h": ll.ParamSpec((d_out,), init=draw)})
    registered(toy, name="toy")
    with pytest.raises(
        ll.BrokenPlugin, match="init of layers.0.self_attn.q_proj.lora_h, called as f.* instead of filling its tensor"
    ):
        ll.attach(net(), toy.Config())
    toy.param_specs = hookimpl(lambda d_out: {"lora_h": ll.ParamSpec((d_out,), init=torch.nn.init.kaiming_uniform_)})
    registered(toy, name="toy")
    with pytest.raises(ll.BrokenPlugin, match="called as f.tensor, generator., failed"):
        ll.attach(net(), toy.Config())


@pytest.mark.parametrize("init", [lambda params: params, lambda params: params.update(lora_C=torch.zeros(1))])
def test_init_hook_that_returns_or_adds(registered: Any, toy: SimpleNamespace, init: Any) -> None:
    toy.init = hookimpl(init)
    registered(toy, name="toy")
    with pytest.raises(ll.BrokenPlugin, match="returned something or added names to params"):
        ll.attach(net(), toy.Config())


def test_methods_with_self_and_decorators_in_the_wrong_order(registered: Any, toy: SimpleNamespace) -> None:
    class Self:
        Config = toy.Config
        param_specs = staticmethod(toy.param_specs)

        @hookimpl
        def forward(self, y: Tensor) -> Tensor:
            return y

    assert "forward takes self; a variant's functions are plain ones, or @staticmethod in a class" in refused(
        registered, Self
    )

    class Order:
        Config = toy.Config
        param_specs = staticmethod(toy.param_specs)

        @hookimpl
        @staticmethod
        def forward(y: Tensor) -> Tensor:
            return y

    assert "forward has @hookimpl above @staticmethod; write @staticmethod first" in refused(registered, Order)


def test_fingerprint_that_is_no_tensor(registered: Any, toy: SimpleNamespace) -> None:
    toy.fingerprint = hookimpl(lambda layer: 1.0)
    registered(toy, name="toy")
    with pytest.raises(ll.BrokenPlugin, match="fingerprint of variant 'toy' returned float; return a tensor or None"):
        ll.attach(net(), toy.Config())


def test_forward_that_forgets_to_return(registered: Any, toy: SimpleNamespace) -> None:
    toy.forward = hookimpl(lambda y: None)
    registered(toy, name="toy")
    model = net()
    ll.attach(model, toy.Config())
    with pytest.raises(ll.BrokenPlugin, match="forward of variant 'toy' returned NoneType; return the new tensor"):
        model(token_ids())
