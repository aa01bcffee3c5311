"""disabled() and merged() in several threads at once, and copies that are made inside of them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll

from .small import X, base, trained
from .threads import Thread

TARGETS = ("first", "second")
LORA = ll.LoRAConfig(r=2, target_names=TARGETS)
WHOLE = ll.LoRAConfig(r=2, target_names=TARGETS, train_modules=("head$",))
OTHER = ll.IA3FFConfig(target_names=("second",))


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    return model(X)


def two(cfg: ll.AdapterConfig = LORA) -> nn.Module:
    return trained(base(), ("other", OTHER), ("style", cfg))


PLAIN = output(base())


class Visitor:
    """A thread that goes into a block of the model and out of it."""

    def __init__(self, model: nn.Module, name: str | None, failing: bool) -> None:
        self.model, self.name, self.failing = model, name, failing
        self.thread, self.block = Thread(), None

    def enter(self) -> None:
        block: AbstractContextManager[None] = ll.disabled(self.model, self.name)
        self.thread(block.__enter__)
        self.block = block

    def leave(self) -> None:
        block, self.block = self.block, None
        error = ValueError("of the body") if self.failing else None
        swallowed = self.thread(lambda: block.__exit__(error and ValueError, error, None))
        assert not swallowed

    def output(self) -> Tensor:
        return self.thread(lambda: output(self.model))


@pytest.fixture
def visitors() -> Iterator[Callable[..., dict[str, Visitor]]]:
    made: dict[str, Visitor] = {}

    def make(model: nn.Module, names: dict[str, str | None], failing: str) -> dict[str, Visitor]:
        made.update({key: Visitor(model, name, key in failing) for key, name in names.items()})
        return made

    yield make
    for visitor in made.values():
        visitor.thread.end()


# A enters, a leaves
@pytest.mark.parametrize("steps", ["AaBb", "ABba", "ABab", "ABaAba", "ABaAab", "ABCabc", "ABCbca"])
@pytest.mark.parametrize("failing", ["", "A", "AB"])
@pytest.mark.parametrize("cfg", [LORA, WHOLE], ids=["layers", "train_modules"])
def test_overlapping_blocks(steps: str, failing: str, cfg: ll.AdapterConfig, visitors: Any) -> None:
    model = two(cfg)
    adapted, tensors = output(model), dict(model.named_parameters())
    assert not torch.allclose(adapted, PLAIN)
    threads = visitors(model, dict.fromkeys("ABC"), failing)
    for step in steps:
        visitor = threads[step.upper()]
        visitor.enter() if step.isupper() else visitor.leave()
        for key, one in threads.items():
            if one.block is not None:
                assert torch.equal(one.output(), PLAIN), f"{key} is inside after {step} of {steps}"
    for one in threads.values():
        assert torch.equal(one.output(), adapted)
    check_whole(model, adapted, tensors)


@pytest.mark.parametrize("steps", ["ABba", "ABab", "BAab", "BAba"])
@pytest.mark.parametrize("names", [("style", "other"), ("style", "style"), ("other", None), ("style", None)])
@pytest.mark.parametrize("cfg", [LORA, WHOLE], ids=["layers", "train_modules"])
def test_overlapping_blocks_of_some_adapters(steps: str, names: Any, cfg: ll.AdapterConfig, visitors: Any) -> None:
    model = two(cfg)
    adapted, tensors = output(model), dict(model.named_parameters())
    threads = visitors(model, dict(zip("AB", names, strict=True)), "")
    for step in steps:
        visitor = threads[step.upper()]
        visitor.enter() if step.isupper() else visitor.leave()
        if threads["B"].block is not None and names[1] is None:
            assert torch.equal(threads["B"].output(), PLAIN)
    check_whole(model, adapted, tensors)


def check_whole(model: nn.Module, adapted: Tensor, tensors: dict[str, nn.Parameter]) -> None:
    """Outside of all blocks, with the very parameters that it had, and with the way back."""
    assert torch.equal(output(model), adapted)
    now = dict(model.named_parameters())
    assert list(now) == list(tensors)
    assert all(now[name] is tensor for name, tensor in tensors.items())
    with ll.disabled(model):
        assert torch.equal(output(model), PLAIN)
        with ll.disabled(model, "style"), ll.disabled(model):
            assert torch.equal(output(model), PLAIN)
        assert torch.equal(output(model), PLAIN)
    assert torch.equal(output(model), adapted)
    ll.detach(model)
    assert torch.equal(output(model), PLAIN)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "in a list": lambda model: copy.deepcopy([model])[0],
    "in a module": lambda model: copy.deepcopy(nn.Sequential(model))[0],
    "of a copy": lambda model: pickle.loads(pickle.dumps(copy.deepcopy(model))),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", [None, "style"])
def test_a_copy_made_inside_disabled_is_outside(how: str, name: str | None) -> None:
    model = two()
    adapted, tensors = output(model), dict(model.named_parameters())
    with ll.disabled(model, name):
        twin = COPIES[how](model)
        with ll.disabled(model):
            inner = COPIES[how](model)
    for one in (twin, inner):
        assert torch.equal(output(one), adapted)
        check_copy(one, model)
    check_whole(model, adapted, tensors)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("block", [ll.merged, ll.disabled])
@pytest.mark.parametrize("name", [None, "style"])
def test_where_a_copy_would_hold_other_weights_for_good_it_is_refused(how: str, block: Any, name: str | None) -> None:
    """Inside merged, and where the base's own head stands in for the trained one."""
    cfg = LORA if block is ll.merged else WHOLE
    model = two(cfg) if name is None else trained(base(), ("style", cfg))
    adapted, tensors = output(model), dict(model.named_parameters())
    with block(model, name):
        inside = output(model)
        with pytest.raises(
            ll.ModelStateError, match=rf"a copy made inside `with {block.__name__}\(model\)` .* leave that"
        ):
            COPIES[how](model)
        assert torch.equal(output(model), inside)
    twin = COPIES[how](model)
    assert torch.equal(output(twin), adapted)
    check_copy(twin, model)
    check_whole(model, adapted, tensors)


def check_copy(twin: nn.Module, model: nn.Module) -> None:
    """It is outside of any block, its adapters come and go, and nothing of it is the model's."""
    assert list(ll.adapters(twin)) == list(ll.adapters(model))
    adapted = output(twin)
    with ll.disabled(twin):
        assert torch.equal(output(twin), PLAIN)
    with ll.merged(twin):
        torch.testing.assert_close(output(twin), adapted, rtol=1e-5, atol=1e-6)
    assert torch.equal(output(twin), adapted)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    with torch.no_grad():
        for adapter in ll.adapters(twin).values():
            for p in adapter.parameters():
                p.add_(0.1)
    assert not torch.allclose(output(twin), adapted)
    ll.attach(twin, LORA, name="more").detach()
    ll.detach(twin)
    expected = base().state_dict()
    assert list(twin.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in twin.state_dict().items())
    assert torch.equal(output(twin), PLAIN)
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in base().parameters()]
