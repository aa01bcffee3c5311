"""What a model was called with, for variants that ask: in the call that is under way, and in its backward."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_lite as ll

IDS = torch.tensor([[5, 3, 1, 2, 6], [1, 2, 4, 1, 2], [7, 7, 1, 7, 7]])  # (1, 2) begins at 2, at 3, and nowhere


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.checkpointed = ""

    def forward(self, input_ids: Tensor, scale: float = 1.0, *, flag: bool = False) -> Tensor:
        x = self.embed(input_ids) * scale
        for layer in self.layers:
            reentrant = self.checkpointed == "reentrant"
            x = checkpoint(layer, x, use_reentrant=reentrant) if self.checkpointed else layer(x)
        return x


def adapted(seed: int = 0) -> tuple[Model, ll.Adapter]:
    torch.manual_seed(seed)
    model = Model()
    adapter = ll.attach(model, ll.LoraLiteConfig(variant="alora", r=2, invocation_tokens=(1, 2)))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    return model, adapter


def test_the_adapter_is_on_from_the_invocation_on() -> None:
    model, adapter = adapted()
    lora = copy.deepcopy(model)
    ll.detach(lora)
    for name, target in ll.attach(lora, ll.LoRAConfig(r=2)).layers().items():
        for bare, tensor in target.params.items():
            tensor.data.copy_(adapter.layers()[name].params[bare])
    got, full = model(IDS), lora(IDS)
    with ll.disabled(lora):
        base = lora(IDS)
    for row, start in enumerate((2, 3, 5)):
        torch.testing.assert_close(got[row, :start], base[row, :start])
        torch.testing.assert_close(got[row, start:], full[row, start:])
    assert not torch.allclose(full, base)


def gradients(adapter: ll.Adapter) -> list[Tensor]:
    found = [p.grad.clone() for p in adapter.parameters() if p.grad is not None]
    for parameter in adapter.parameters():
        parameter.grad = None
    return found


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_in_backward_it_is_that_of_the_call_whose_graph_it_is(kind: str) -> None:
    """Two calls of one model before one backward, a third one between forward and backward, another model beside."""
    model, adapter = adapted()
    model.embed.weight.requires_grad_(True)  # reentrant checkpointing wants an input with a gradient
    other, beside = adapted(1)
    batches = [IDS, IDS.flip(0), IDS.roll(1, 1)]
    expected = []
    for ids in batches:
        model(ids).square().mean().backward()
        expected.append(gradients(adapter))
    model.checkpointed = other.checkpointed = kind
    other.embed.weight.requires_grad_(True)
    ys = [model(ids) for ids in batches[:2]]
    with torch.no_grad():
        model(batches[2])
    theirs = other(batches[2])
    (ys[0].square().mean() + ys[1].square().mean()).backward()
    for got, one, two in zip(gradients(adapter), *expected[:2], strict=True):
        torch.testing.assert_close(got, one + two)
    theirs.square().mean().backward()
    assert gradients(beside)
    first, second = (model(ids) for ids in batches[:2])
    first.square().mean().backward()
    for got, one in zip(gradients(adapter), expected[0], strict=True):
        torch.testing.assert_close(got, one)
    second.square().mean().backward()
    for got, one in zip(gradients(adapter), expected[1], strict=True):
        torch.testing.assert_close(got, one)


def asking(seen: list[Any]) -> SimpleNamespace:
    class Config(ll.AdapterConfig):
        variant = "asking"

    @ll.hookimpl
    def param_specs(d_out: int) -> dict[str, ll.ParamSpec]:
        return {"lora_h": ll.ParamSpec((d_out,))}

    @ll.hookimpl
    def forward(y: Tensor, params: dict[str, Tensor], context: Any) -> Tensor:
        seen.append(dict(context))
        return y + params["lora_h"].to(y.dtype)

    return SimpleNamespace(Config=Config, param_specs=param_specs, forward=forward)


def test_names_and_what_context_adds(registered: Any) -> None:
    seen: list[Any] = []
    registered(asking(seen), name="asking")
    model = Model()
    ll.attach(model, ll.LoraLiteConfig(variant="asking", target_names=("layers.0.up",)))
    model(IDS, 2.0)
    model(input_ids=IDS, flag=True)
    with ll.context(model, task_ids=3, flag=1):
        with ll.context(model, task_ids=4):
            model(IDS)
        model(IDS, flag=False)
    model(IDS)
    given = [{key: value for key, value in one.items() if key != "input_ids"} for one in seen]
    assert all(one["input_ids"] is IDS for one in seen)
    assert given == [{"scale": 2.0}, {"flag": True}, {"task_ids": 4, "flag": 1}, {"task_ids": 3, "flag": 1}, {}]


def test_outside_of_a_call_nothing_stale_is_read() -> None:
    model, _ = adapted()
    model(IDS)
    message = (
        r"variant 'alora' on layers.0.up asks what the model was called with, and a layer of it was called on its own"
    )
    with pytest.raises(ll.ModelStateError, match=message):
        model.layers[0](torch.randn(1, 5, 8))
    with pytest.raises(TypeError):
        model(IDS, nothing=1)
    with pytest.raises(ll.ModelStateError, match="called on its own"):
        model.layers[0](torch.randn(1, 5, 8))
    plain = Model()
    with pytest.raises(ll.ModelStateError, match="no adapter on the model asks for context"), ll.context(plain, a=1):
        pass


def test_copies_files_detach_and_merge(tmp_path: Path) -> None:
    model, _ = adapted()
    expected = model(IDS).detach()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(copied(IDS), expected)
        with ll.context(copied, unused=1):
            torch.testing.assert_close(copied(IDS), expected)
    ll.save(model, tmp_path / "a.safetensors")
    torch.manual_seed(0)
    fresh = Model()
    ll.load(fresh, tmp_path / "a.safetensors")
    torch.testing.assert_close(fresh(IDS), expected)
    with pytest.raises(
        ll.MergeError, match=r"layers.0.up with 'default' \(alora\) computes another thing with every call"
    ):
        ll.merge(model)
    ll.detach(model)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_compiled_whole() -> None:
    model, _ = adapted()
    expected = model(IDS)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS), expected)
    torch.testing.assert_close(compiled(IDS.flip(0)), model(IDS.flip(0)))


def test_threads_have_calls_of_their_own() -> None:
    model, _ = adapted()
    batches = [IDS.roll(shift, 1) for shift in range(4)]
    expected = [model(ids).detach() for ids in batches]
    wrong: list[int] = []

    def run(which: int) -> None:
        for _ in range(30):
            if not torch.allclose(model(batches[which]).detach(), expected[which], atol=1e-5):
                wrong.append(which)

    threads = [threading.Thread(target=run, args=(which,)) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_kit_is_green() -> None:
    from lora_lite_core.testing import run_checks

    results = run_checks(ll.LoraLiteConfig(variant="alora", r=4))  # LoRA, on the kit's model, which has no tokens
    assert not [result.message for result in results if not result.ok]
