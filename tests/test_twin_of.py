"""Twins of modules: what a forward of the twin writes shows nowhere in the original."""

from __future__ import annotations

import functools
import threading
import types
import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import lora_lite as ll
from lora_lite_core.layers.twins import Twins, twin_of

from .models import net, token_ids


@dataclass
class Cache:
    seen: list[torch.Tensor] = field(default_factory=list)
    calls: int = 0


class Pair(NamedTuple):
    first: nn.Module
    second: int


class Writing(nn.Module):
    """Writes wherever a forward can write, in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(1, 4))
        self.list: list[Any] = []
        self.dict: dict[str, Any] = {"inner": {"deep": []}}
        self.default: defaultdict[str, list[Any]] = defaultdict(list)
        self.queue: deque[Any] = deque(maxlen=2)
        self.space = types.SimpleNamespace(calls=0)
        self.cache = Cache()
        self.pair = Pair(self.linear, 1)
        self.held = [self.linear]  # not a submodule by this way
        self.parent = weakref.ref(self)
        self.run = self.linear.forward
        self.later = functools.partial(nn.Linear.forward, self.linear)
        self.lock = threading.Lock()
        self.kernel: Callable[[torch.Tensor], torch.Tensor] = torch.relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.lock:
            self.count += 1
            self.last = x
            self.list.append(x)
            self.dict["inner"]["deep"].append(x)
            self.default["x"].append(x)
            self.queue.append(x)
            self.space.calls += 1
            self.cache.calls += 1
            self.cache.seen.append(x)
            self.cache.extra = x  # type: ignore[attr-defined]
            self.mark = 1
            for module in (self.linear, self.pair.first, self.held[0], self.parent().linear):  # type: ignore[union-attr]
                module.touched = True
            y = self.linear(x) + self.run(x) + self.later(x)
            self.linear.weight.note = 1  # type: ignore[attr-defined]
            self.linear.bias.data = self.linear.bias.data + 1
            self.linear.weight.requires_grad_(False)
            return self.kernel(y)


def state(module: nn.Module) -> Any:
    """Everything of a module tree that a test can compare, objects by identity and tensors by their bytes, too."""

    def of(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return id(value), value.data_ptr(), value.requires_grad, value.tolist(), sorted(vars(value))
        if isinstance(value, dict):
            return id(value), [(key, of(one)) for key, one in value.items()]
        if isinstance(value, (list, tuple, deque)):
            return id(value), [of(one) for one in value]
        if isinstance(value, (Cache, types.SimpleNamespace)):
            return id(value), of(vars(value))
        return id(value)

    return [(name, {key: of(value) for key, value in vars(inner).items()}) for name, inner in module.named_modules()]


def test_a_forward_of_the_twin_does_not_show() -> None:
    model = Writing()
    model.train()
    before = state(model)
    x = torch.randn(2, 4)
    with torch.no_grad():
        got = twin_of(model)(x)
    assert state(model) == before
    twin = twin_of(model)
    twin(x)
    assert (twin.count, twin.space.calls, twin.cache.calls, len(twin.queue)) == (1, 1, 1, 1)
    assert not twin.training
    assert not twin.linear.training
    assert type(twin) is Writing
    assert twin.lock is model.lock
    assert twin.linear.weight.data_ptr() == model.linear.weight.data_ptr()
    with torch.no_grad():
        assert torch.equal(got, model(x))


def test_the_twin_hangs_together_as_the_model_does() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[2] = model[0]
    twin = twin_of(model)
    assert twin[1].weight is twin[0].weight
    assert twin[2] is twin[0]
    assert twin[0] is not model[0]
    assert type(twin[0].weight) is nn.Parameter
    assert twin[0].weight.requires_grad


def test_copies_are_made_once() -> None:
    model, twins = nn.Sequential(nn.Linear(4, 4)), Twins()
    first = twins.of(model[0])
    assert twins.of(model)[0] is first
    given = twins.of(((model[0], 1), {"x": [torch.zeros(2)]}))
    assert given[0][0] is first


def test_a_forward_that_was_put_on_a_module_runs_the_copies() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    layer, called, old = model[0], [], model[0].forward

    def doubled(x: torch.Tensor, *, of: nn.Module = layer) -> torch.Tensor:
        called.append(of)
        of.mark = 1  # type: ignore[assignment]
        return 2 * old(x)

    layer.forward = doubled  # type: ignore[method-assign]
    model.register_forward_hook(lambda module, *_: setattr(layer, "hooked", True))
    x = torch.randn(2, 4)
    expected = 2 * nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(twin_of(model)(x), expected)
    assert called == []
    assert not hasattr(layer, "mark")
    assert not hasattr(layer, "hooked")


def test_what_accelerate_puts_on_a_layer_runs_the_copy() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    layer = nn.Linear(4, 4)
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    twin = twin_of(layer)
    twin.weight = nn.Parameter(torch.zeros(4, 4))
    assert torch.equal(twin(torch.ones(1, 4))[0], layer.bias)
    assert layer._hf_hook is not twin._hf_hook
    assert vars(layer._hf_hook).keys() == vars(twin._hf_hook).keys()
    x = torch.ones(1, 4)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_objects_of_the_user_that_a_hook_holds_are_not_copied() -> None:
    class Recorder:
        def __init__(self, everything: object) -> None:
            self.everything, self.calls = everything, 0

        def hook(self, *_: Any) -> None:
            self.calls += 1

    recorder = Recorder(object())
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(recorder.hook)
    twin_of(layer)(torch.zeros(1, 4))
    assert recorder.calls == 1


@pytest.mark.parametrize("write", ["add_", "view", "out", "foreach", "renorm", "fill", "list"])
def test_memory_that_is_shared_is_not_written(write: str) -> None:
    class Clipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.embedding = nn.Embedding(4, 4, max_norm=0.1)
            self.kept = [torch.ones(4, 4)]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = self.linear.weight
            if write == "add_":
                weight.add_(1)
                assert torch.equal(weight, weight.clone())
            elif write == "view":
                weight[0] = 7
            elif write == "out":
                torch.add(weight, 1, out=weight.data)
            elif write == "foreach":
                torch._foreach_add_([weight, self.linear.bias], 1)
            elif write == "renorm":
                self.embedding(torch.arange(4))
            elif write == "fill":
                nn.init.zeros_(weight)
            else:
                self.kept[0].mul_(3)
                assert float(self.kept[0][0, 0]) == 3
            return self.linear(x)

    model = Clipping()
    before, version = state(model), model.linear.weight._version
    twins = Twins()
    twin = twins.of(model)
    with torch.no_grad(), twins.kept_apart():
        twin(torch.ones(1, 4))
    assert state(model) == before
    assert model.linear.weight._version == version


def test_buffers_are_copied_but_for_packed_weights() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features = self.out_features = 4
            self.register_buffer("codes", torch.zeros(4, dtype=torch.int32))

    model = nn.Sequential(nn.BatchNorm1d(4), Packed(), nn.Linear(4, 4))
    model[2].register_buffer("calls", torch.zeros(()))
    twin = twin_of(model)
    twin[2].calls += 1
    assert float(model[2].calls) == 0
    assert twin[0].running_mean.data_ptr() != model[0].running_mean.data_ptr()
    assert twin[1].codes.data_ptr() == model[1].codes.data_ptr()
    assert twin[1].codes is not model[1].codes


def test_parametrised_layers() -> None:
    layer = parametrizations.spectral_norm(nn.Linear(6, 5))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    twin = twin_of(layer).train()
    for _ in range(3):
        twin(torch.randn(2, 6))
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
    own = {p.data_ptr() for p in layer.parameters()}
    assert {p.data_ptr() for p in twin.parameters()} == own


@pytest.mark.filterwarnings("ignore")  # newer versions of torch deprecate torch.jit
def test_scripted_and_lazy_modules() -> None:
    class Scripted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    lazy = nn.LazyLinear(3)
    model = nn.Sequential(torch.jit.script(Scripted()), lazy)
    assert twin_of(model)(torch.ones(2, 4)).shape == (2, 3)
    assert isinstance(lazy.weight, nn.parameter.UninitializedParameter)


def test_a_class_that_forbids_copies() -> None:
    class Sharded(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("no deepcopy here")

    with pytest.raises(
        ll.ModelStateError,
        match=r"Sharded forbids the copy .* \(no deepcopy here\); run it before the model is sharded",
    ):
        twin_of(nn.Sequential(Sharded(2, 2)))


def test_adapters_act_on_the_twin_as_on_the_model() -> None:
    model = net().eval()
    adapter = ll.attach(model, ll.LoRAConfig(r=2))
    for _, tensor in adapter.named_tensors():
        tensor.data.normal_()
    twin = twin_of(model)
    assert torch.equal(twin(token_ids()), model(token_ids()))
    ll.detach(model)
    with_it = twin(token_ids())
    assert not torch.equal(with_it, model(token_ids()))


def test_a_model_that_other_threads_run_is_copied_while_they_do() -> None:
    """Attributes that come and go during the copy."""

    class Growing(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for number in range(20):
                setattr(self, f"note_{number}", number)
            for number in range(20):
                delattr(self, f"note_{number}")
            return super().forward(x)

    model, stop, failed = nn.Sequential(*[Growing(4, 4) for _ in range(4)]), threading.Event(), []

    def run() -> None:
        x = torch.ones(1, 4)
        while not stop.is_set():
            try:
                model(x)
            except Exception as error:
                failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(100):
            twin_of(model)
    finally:
        stop.set()
        thread.join()
    assert failed == []


# --- bitsandbytes ------------------------------------------------------------------------------------------------


def test_a_quantised_layer_keeps_its_own_notes() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4")
    layer = layer.to("cpu").to(torch.bfloat16).eval()
    layer.support_avx512bf16_for_cpu = True
    notes, quant_state = dict(vars(layer)), dict(vars(layer.weight.quant_state))
    twin = twin_of(layer)
    assert twin.support_avx512bf16_for_cpu is False
    assert type(twin.weight) is type(layer.weight)
    assert twin.weight.quant_state is twin.quant_state is not layer.quant_state
    assert twin.weight.module is twin
    twin(torch.ones(2, 64))
    assert twin.bias.dtype == torch.float32
    assert layer.bias.dtype == torch.bfloat16
    twin.weight.data, twin.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        twin.weight.data, twin.weight.quant_state
    )
    assert {k: v for k, v in vars(layer).items() if v is not notes[k]} == {}
    assert {k: v for k, v in vars(layer.weight.quant_state).items() if v is not quant_state[k]} == {}


def test_an_8bit_layer_keeps_its_own_state() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False).to("cpu")
    twin = twin_of(layer)
    twin(torch.ones(2, 64))
    assert layer.weight.CB is not None
    assert layer.state.CB is None
    assert layer.state.is_training is True
    assert twin.state.CB.data_ptr() == layer.weight.CB.data_ptr()
