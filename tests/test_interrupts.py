"""All or nothing, also under Ctrl-C: every operation, interrupted at every line of the library that it runs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from importlib_metadata import Distribution
from torch import Tensor, nn

import lora_lite as ll

from .interrupting import Case, Operation, check
from .small import X, base, conv1d, experts, observed, quantised, trained
from .whole_state import differences, process, restore

TARGETS = ("first", "second")
LORA = ll.LoRAConfig(r=2, target_names=TARGETS)
WHOLE = ll.LoRAConfig(r=2, target_names=TARGETS, train_modules=("head$",))
OTHER = ll.IA3FFConfig(target_names=("second",))
FILE = "adapter.safetensors"


def with_style(cfg: ll.AdapterConfig = LORA, model: Any = base) -> nn.Module:
    return trained(model(), ("style", cfg))


def with_two(cfg: ll.AdapterConfig = LORA) -> nn.Module:
    """ "other" is before "style", and on one layer with it."""
    return trained(base(), ("other", OTHER), ("style", cfg))


def on_meta() -> nn.Module:
    """An adapter that waits for its values, on a model that has got its weights."""
    model = base().to("meta")
    ll.attach(model, LORA, name="style")
    model.load_state_dict(base().state_dict(), strict=False, assign=True)
    return model


def attach(cfg: ll.AdapterConfig, **options: Any) -> Operation:
    return lambda model, _: ll.attach(model, cfg, name="style", **options)


def detach(name: str | None = "style") -> Operation:
    return lambda model, _: ll.detach(model, name)


def load(**options: Any) -> Operation:
    return lambda model, folder: ll.load(model, folder / FILE, name="style", **options)


def import_peft(**options: Any) -> Operation:
    return lambda model, folder: ll.import_peft(model, folder / "peft", name="style", **options)


def initialize(model: nn.Module, _: Path) -> None:
    ll.adapters(model)["style"].initialize()


def save(model: nn.Module, folder: Path) -> None:
    ll.save(model, folder / FILE, name="style")


def merge(**options: Any) -> Operation:
    return lambda model, _: ll.merge(model, **options)


def attaching(make: Callable[[], nn.Module], cfg: ll.AdapterConfig, **options: Any) -> Case:
    return Case(lambda _: make(), attach(cfg, **options), further=detach(), leads_back=True)


def loading(cfg: ll.AdapterConfig, make: Callable[[], nn.Module] = base, **options: Any) -> Case:
    def model(folder: Path) -> nn.Module:
        ll.save(with_style(cfg, base if make is on_meta else make), folder / FILE, name="style")
        return make()

    return Case(model, load(**options), further=detach(), leads_back=make is not on_meta)


def importing(cfg: ll.AdapterConfig, **options: Any) -> Case:
    def model(folder: Path) -> nn.Module:
        ll.export_peft(with_style(cfg), folder / "peft", name="style")
        return base()

    return Case(model, import_peft(**options), further=detach(), leads_back=True)


def saving(cfg: ll.AdapterConfig, over: bool = True) -> Case:
    def model(folder: Path) -> nn.Module:
        if over:
            ll.save(trained(base(), ("other", OTHER), ("style", cfg)), folder / FILE, name="style")
        return with_style(cfg)

    return Case(model, save, further=load_another)


def load_another(model: nn.Module, folder: Path) -> None:
    """The file is one that can be read."""
    ll.detach(model)
    ll.load(model, folder / FILE, name="style")


def starting(make: Callable[..., nn.Module], operate: Operation, *given: Any, further: Operation | None = None) -> Case:
    return Case(lambda _: make(*given), operate, further=further or attach(LORA))


def inside(block: Any, name: str | None, make: Callable[..., nn.Module], *given: Any) -> Case:
    """A with-block, which leaves no trace."""

    def operate(model: nn.Module, _: Path) -> Tensor:
        with block(model, name):
            y = model(X)
        return y  # noqa: RET504  (a return in the block would leave it in another way)

    return Case(lambda _: make(*given), operate, further=detach(None), stays=True)


PISSA = ll.PiSSAConfig(r=2, target_names=TARGETS)
DORA = ll.DoRAConfig(r=2, target_names=TARGETS)

CASES: dict[str, Case] = {
    "attach": attaching(observed, LORA),
    "attach, hra": attaching(observed, ll.HRAConfig(r=2, target_names=TARGETS)),
    "attach, train_modules": attaching(base, WHOLE),
    "attach, beside another": attaching(lambda: trained(base(), ("other", OTHER)), LORA),
    "attach, conv1d": attaching(conv1d, LORA),
    "attach, 4 bit": attaching(quantised, LORA),
    "attach, on meta": attaching(lambda: base().to("meta"), LORA),
    "initialize": starting(on_meta, initialize, further=detach()),
    "load": loading(LORA),
    "attach, experts": attaching(experts, LORA),
    "load, experts": loading(LORA, experts),
    "merged, experts": inside(ll.merged, "style", lambda: with_style(LORA, experts)),
    "merge, experts": starting(with_style, merge(), LORA, experts),
    "detach, the first of two": starting(with_two, detach("other"), further=detach(None)),
    "detach, the last of two": starting(with_two, detach("style")),
    "detach, the only one": starting(with_style, detach("style")),
    "detach, all": starting(with_two, detach(None)),
    "detach, train_modules": starting(with_two, detach("style"), WHOLE),
    "detach, 4 bit": starting(with_style, detach("style"), LORA, quantised),
    "disabled, one": inside(ll.disabled, "style", with_two),
    "disabled, all": inside(ll.disabled, None, with_two),
    "disabled, train_modules": inside(ll.disabled, None, with_style, WHOLE),
    "merged": inside(ll.merged, "style", with_style),
    "merge": starting(with_style, merge()),
    "save": saving(LORA),
    "save, a new file": saving(LORA, over=False),
    "save, train_modules": saving(WHOLE),
    "import_peft": importing(LORA),
}
FAST = ("save", "detach, the first of two", "disabled, one")
SLOW = (
    "attach", "attach, hra", "attach, on meta", "initialize", "load", "save, a new file",
    *(name for name in CASES if name.startswith(("detach", "disabled")) and name not in FAST),
)  # fmt: skip
MORE: dict[str, Case] = {
    "attach, pissa": attaching(base, PISSA),
    "attach, eva": attaching(base, ll.EVAConfig(r=2, target_names=TARGETS), calibration_data=[X.repeat(8, 1)]),
    "attach, pissa on conv1d": attaching(conv1d, PISSA),
    "attach, pissa on 4 bit": attaching(quantised, PISSA),
    "attach, dora": attaching(base, DORA),
    "attach, check_inputs": attaching(base, LORA, check_inputs=X),
    "load, frozen": loading(LORA, trainable=False),
    "merge, train_modules": starting(with_style, merge(), WHOLE),
    "merge, to_dense": starting(with_style, merge(to_dense=True), LORA, quantised),
    "load, 4 bit": loading(LORA, quantised),
    "load, in place of one on meta": loading(LORA, on_meta),
    "merged, train_modules": inside(ll.merged, None, with_style, WHOLE),
    "load, train_modules": loading(WHOLE),
    "load, beside another": loading(LORA, lambda: trained(base(), ("other", OTHER))),
    "merged, two": inside(ll.merged, None, with_two),
    "import_peft, frozen": importing(LORA, trainable=False),
    "import_peft, modules_to_save": importing(WHOLE),
    "load, dora": loading(DORA),
    "load, pissa": loading(PISSA),
    "load, pissa on conv1d": loading(PISSA, conv1d),
    "load, pissa on 4 bit": loading(PISSA, quantised),
    "merged, hra": inside(ll.merged, "style", with_style, ll.HRAConfig(r=2, target_names=TARGETS)),
    "import_peft, dora": importing(DORA),
}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # left at the end of a with-block: Python closes it
@pytest.mark.parametrize(
    "name",
    [
        *FAST,
        *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in {**CASES, **MORE} if name not in FAST + SLOW),
    ],
)
def test_an_interrupted_operation_has_happened_or_not(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two searches, thousands of times, would take most of the time: of the environment for plugins, and of the heap
    for what holds the model (a compiled one, an enclosing one: here nothing does), or a 4-bit layer beside it."""
    if name.startswith("import_peft"):
        package = "lora-lite-ortho" if name.endswith("dora") else "lora-lite-lora"
        discover = Distribution.discover
        found = [one for one in discover() if one.name == package]
        monkeypatch.setattr(Distribution, "discover", lambda **given: discover(**given) if given else found)
    monkeypatch.setattr(gc, "get_referrers", lambda *_: [])
    monkeypatch.setattr(gc, "get_objects", lambda *_: [])
    check({**CASES, **MORE}[name], tmp_path)


def a_hook_is_interrupted(entered: list[bool]) -> Callable[..., Any]:
    """As it leaves its own with-block, which has then been entered for good."""

    def hook(**_: Any) -> None:
        if entered:
            torch.autocast("cpu", dtype=torch.float16).__enter__()
            torch.no_grad().__enter__()
            raise KeyboardInterrupt

    return hook


@pytest.mark.parametrize("outside", [False, True], ids=["outside of autocast", "in autocast"])
@pytest.mark.parametrize("at", ["init", "forward"])
def test_modes_that_a_variant_has_not_left(at: str, outside: bool, toy: Any, registered: Any) -> None:
    """Autocast a level too deep would keep its cache of cast weights for ever."""
    entered: list[bool] = []
    interrupt = a_hook_is_interrupted(entered)

    @ll.hookimpl
    def init(params: dict[str, Tensor]) -> None:
        interrupt()

    @ll.hookimpl
    def forward(y: Tensor, params: dict[str, Tensor]) -> Tensor:
        interrupt()
        return y + params["lora_h"].to(y.dtype)

    setattr(toy, at, {"init": init, "forward": forward}[at])
    registered(toy, name="toy")
    model = base()
    if at == "forward":
        ll.attach(model, toy.Config(target_names=TARGETS))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outside):
        entered.append(True)
        before = process()
        try:
            with pytest.raises(KeyboardInterrupt):
                ll.attach(model, toy.Config(target_names=TARGETS)) if at == "init" else ll.merge(model)
            assert differences(process(), before) == ""
        finally:
            restore(before)
