"""The base is served by other threads while adapters come and go: every output is the base's, bit for bit.

Nothing here depends on chance: one thread stops before every line that it runs, and the other one works meanwhile.
"""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll

from .interrupting import Lines, place
from .small import X, base, conv1d, quantised, trained
from .threads import Thread

TARGETS = ("first", "second")
LORA = ll.LoRAConfig(r=2, target_names=TARGETS)
DORA = ll.DoRAConfig(r=2, target_names=TARGETS)
PISSA = ll.PiSSAConfig(r=2, target_names=TARGETS)
IA3_FF = ll.IA3FFConfig(target_names=TARGETS)
WHOLE = ll.LoRAConfig(r=2, target_names=TARGETS, train_modules=("head$",))
FILE = "adapter.safetensors"
Operation = Callable[[nn.Module, Path], Any]
HOOKS_OF_TORCH = "torch.nn.modules.module"  # where hooks are put on, taken off and called


@pytest.fixture
def thread() -> Iterator[Thread]:
    thread = Thread()
    yield thread
    thread.end()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without searches of the heap for what holds the model (a compiled one, an enclosing one: here nothing does), or
    for a 4-bit layer beside it."""
    monkeypatch.setattr(gc, "get_referrers", lambda *_: [])
    monkeypatch.setattr(gc, "get_objects", lambda *_: [])


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    return model(X)


def frozen(make: Callable[[], nn.Module] = base) -> nn.Module:
    """A base as it is while it serves: frozen, and evaluated before."""
    model = make().requires_grad_(False)
    ll.prepare(model)
    output(model)
    return model


def nothing(*_: Any) -> None:
    pass


def attach(cfg: ll.AdapterConfig = LORA, **options: Any) -> Operation:
    return lambda model, _: ll.attach(model, cfg, **options)


def fresh_file(cfg: ll.AdapterConfig, make: Callable[[], nn.Module] = base) -> Operation:
    """Of an adapter that computes what the base does."""

    def write(_: nn.Module, folder: Path) -> None:
        ll.attach(twin := frozen(make), cfg)
        ll.save(twin, folder / FILE)

    return write


def load(model: nn.Module, folder: Path) -> None:
    ll.load(model, folder / FILE)


def save(model: nn.Module, folder: Path) -> None:
    ll.save(model, folder / FILE)


def detach(model: nn.Module, _: Path) -> None:
    ll.detach(model, "default")


def look(model: Any, _: Path) -> None:
    for layer in (model.first, model.second):
        ll.dense_weight(layer)
        ll.sketch(layer)


def cover(model: nn.Module, _: Path) -> None:
    ll.coverage(model, X)


def disable(model: nn.Module, _: Path) -> None:
    with ll.disabled(model):
        pass


def merge_elsewhere(_: nn.Module, __: Path) -> None:
    twin = trained(base(), ("default", LORA))
    with ll.merged(twin):
        output(twin)
    ll.merge(twin)


def in_training() -> nn.Module:
    """Its normalisation takes the batch's own statistics: in eval mode it would compute something else."""
    model: Any = base()
    model.head.train()
    return model


SERVED: dict[str, tuple[Callable[[], nn.Module], Operation, Operation]] = {
    "attach": (base, nothing, attach()),
    "attach dora": (base, nothing, attach(DORA)),
    "attach pissa": (base, nothing, attach(PISSA)),
    "attach ia3_ff": (base, nothing, attach(IA3_FF)),
    "attach, train_modules": (base, nothing, attach(WHOLE)),
    "attach, check_inputs": (in_training, nothing, attach(check_inputs=X)),
    "attach another": (base, attach(DORA, name="other"), attach()),
    "attach dora, conv1d": (conv1d, nothing, attach(DORA)),
    "attach pissa, conv1d": (conv1d, nothing, attach(PISSA)),
    "attach pissa, 4 bit": (quantised, nothing, attach(PISSA)),
    "load": (base, fresh_file(LORA), load),
    "load dora": (base, fresh_file(DORA), load),
    "load, train_modules": (base, fresh_file(WHOLE), load),
    "load pissa, conv1d": (conv1d, fresh_file(PISSA, conv1d), load),
    "load pissa, 4 bit": (quantised, fresh_file(PISSA, quantised), load),
    "save": (base, attach(), save),
    "detach": (base, attach(), detach),
    "detach ia3_ff": (base, attach(IA3_FF), detach),
    "detach one of two": (base, lambda *given: (attach(DORA, name="other")(*given), attach()(*given)), detach),
    "detach, train_modules": (base, attach(WHOLE), detach),
    "disabled": (base, attach(), disable),
    "disabled, train_modules": (base, attach(WHOLE), disable),
    "dense_weight and sketch": (base, nothing, look),
    "dense_weight and sketch, conv1d": (conv1d, nothing, look),
    "dense_weight and sketch, 4 bit": (quantised, nothing, look),
    "coverage": (base, nothing, cover),
    "coverage, in training": (in_training, nothing, cover),
    "merge elsewhere": (base, nothing, merge_elsewhere),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if n % 2 else [pytest.mark.slow]) for n, name in enumerate(SERVED)]
)
def test_whatever_an_operation_is_at_the_base_is_served(name: str, thread: Thread, tmp_path: Path) -> None:
    """Before every line of the operation another thread runs a whole forward pass."""
    make, prepare, operate = SERVED[name]
    model = frozen(make)
    prepare(model, tmp_path)
    expected, wrong = output(model), []

    def visit(number: int, frame: FrameType) -> None:
        if what := differs(lambda: thread(lambda: output(model)), expected):
            wrong.append(f"{number} {place(frame)}: {what}")

    lines = Lines(visit, HOOKS_OF_TORCH)
    lines.run(lambda: operate(model, tmp_path))
    assert lines.number > 5
    assert not wrong, f"{len(wrong)} of {lines.number} forward passes\n" + "\n".join(wrong[:10])
    assert torch.equal(output(model), expected)


MEANWHILE = [name for name in SERVED if name not in ("save", "merge elsewhere", "coverage", "attach, check_inputs")]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if n % 2 else []) for n, name in enumerate(MEANWHILE)]
)
def test_a_forward_pass_that_an_operation_overtakes(name: str, thread: Thread, tmp_path: Path) -> None:
    """Before every line of a forward pass, in torch's code and ours, another thread does the whole operation."""
    make, prepare, operate = SERVED[name]
    template, wrong = frozen(make), []
    prepare(template, tmp_path)
    expected = output(template)
    counted = Lines(nothing, HOOKS_OF_TORCH)
    counted.run(lambda: output(template))
    for at in range(1, counted.number + 1):
        model, where = copy.deepcopy(template), []

        def visit(number: int, frame: FrameType, at: int = at, model: Any = model, where: list[str] = where) -> None:
            if number == at:
                where.append(place(frame))
                thread(lambda: operate(model, tmp_path))

        if what := differs(lambda model=model: Lines(visit, HOOKS_OF_TORCH).run(lambda: output(model)), expected):
            wrong.append(f"{at} {where}: {what}")
    assert not wrong, f"{len(wrong)} of {counted.number} forward passes\n" + "\n".join(wrong[:10])


def test_a_tensor_that_was_removed_from_the_layer_is_missed() -> None:
    """What has not been taken off must run, or say why not."""
    model: Any = frozen()
    ll.attach(model, LORA)
    del model.first.lora_B
    with pytest.raises(AttributeError, match="lora_B"):
        output(model)


def differs(function: Callable[[], Tensor], expected: Tensor) -> str:
    try:
        found = function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if torch.equal(found, expected) else f"off by {float((found - expected).abs().max()):.2g}"


def test_forward_passes_while_adapters_come_and_go() -> None:
    """The same without a conductor: two threads and this one, all as fast as they can."""
    model = frozen()
    expected, start, found = output(model), threading.Barrier(3), []

    def serve() -> None:
        start.wait(60)
        found.extend(differs(lambda: output(model), expected) for _ in range(200))

    serving = [threading.Thread(target=serve, daemon=True) for _ in range(2)]
    for thread in serving:
        thread.start()
    start.wait(60)
    for _ in range(30):
        ll.attach(model, PISSA).detach()
    for thread in serving:
        thread.join(60)
    assert len(found) == 400
    assert not any(found), {what for what in found if what}
