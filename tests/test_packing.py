"""The rearranged 4-bit layers of AVX512-BF16 processors, with bitsandbytes' own functions, on any processor."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite_core.layers import four_bit_packing
from lora_lite_core.layers.four_bit_packing import Unpacking, let_pack
from lora_lite_core.layers.kinds.layer_kinds import storage_of

bnb = pytest.importorskip("bitsandbytes")
FLAG = "support_avx512bf16_for_cpu"


def keep_unpacked(model: nn.Module) -> list[str]:
    plan = Unpacking(model)
    plan.apply()
    return plan.names


@pytest.fixture(autouse=True)
def packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes believes that this processor has AVX512-BF16, whatever it is."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)


def make(kind: str = "nf4", nested: bool = False, sizes: tuple[int, int] = (64, 96)) -> Any:
    torch.manual_seed(0)
    classes = {"LinearNF4": bnb.nn.LinearNF4, "LinearFP4": bnb.nn.LinearFP4, "Derived": Derived}
    if kind in classes:
        layer = classes[kind](*sizes, compress_statistics=nested)
    else:
        layer = bnb.nn.Linear4bit(*sizes, quant_type=kind, compress_statistics=nested)
    layer.load_state_dict(nn.Linear(*sizes).state_dict())
    layer = layer.to("cpu")
    assert getattr(layer, FLAG) is True
    return layer


class Derived(bnb.nn.LinearNF4):
    pass


def quantised(nested: bool = False) -> Any:
    return nn.Sequential(make(nested=nested))


def snapshot(model: nn.Module) -> Any:
    """Of every 4-bit layer the objects, the bytes and all notes."""
    found = []
    for layer in model.modules():
        if not isinstance(layer, bnb.nn.Linear4bit):
            continue
        weight: Any = layer.weight
        state = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in vars(weight.quant_state).items()}
        nested = state.pop("state2", None)
        inner = nested and {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in vars(nested).items()}
        notes = {k: v for k, v in vars(layer).items() if isinstance(v, (bool, torch.dtype, type(None)))}
        objects = id(weight), id(weight.quant_state), id(layer.quant_state), id(layer.bias)
        found.append((objects, weight.data_ptr(), weight.tolist(), state, inner, notes, layer.bias.tolist()))
    return found


def rearrange(layer: Any) -> None:
    """What an evaluation does to the layer on such a processor."""
    layer.weight.data, layer.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )


def dense(layer: Any) -> torch.Tensor:
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


@pytest.mark.parametrize("nested", [False, True])
def test_an_evaluated_baseline_is_put_back(nested: bool) -> None:
    model, fresh = quantised(nested), quantised(nested)
    codes = fresh[0].weight.data.clone()
    expected = dense(fresh[0])
    rearrange(model[0])
    adapter = ll.attach(model, ll.LoRAConfig(r=4))
    assert torch.equal(model[0].weight.data, codes)
    torch.testing.assert_close(dense(model[0]), expected, rtol=2**-8, atol=0)
    twin = nn.Sequential(nn.Linear(64, 96))
    twin.load_state_dict({"0.weight": dense(model[0]), "0.bias": model[0].bias.data})
    other = ll.attach(twin, ll.LoRAConfig(r=4))
    x = torch.randn(5, 64)
    for one in (model, twin):
        optimizer = torch.optim.AdamW(ll.adapters(one)["default"].parameters(), lr=1e-2)
        for _ in range(5):
            one(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for (_, ours), (_, theirs) in zip(adapter.named_tensors(), other.named_tensors(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-3)


def test_adapted_layers_do_not_rearrange_and_the_flag_comes_back() -> None:
    model = quantised()
    model.append(nn.Linear(96, 8))
    codes = model[0].weight.data.clone()
    ll.attach(model, ll.PiSSAConfig(r=4, target_names=("1",)))  # the 4-bit layer is no target
    assert getattr(model[0], FLAG) is False
    model.eval()(torch.randn(2, 64))
    assert torch.equal(model[0].weight.data, codes)
    ll.detach(model)
    assert getattr(model[0], FLAG) is True


def test_probing_does_not_rearrange() -> None:
    model = quantised().eval()
    codes = model[0].weight.data.clone()
    ll.attach(model, ll.PiSSAConfig(r=4))
    assert torch.equal(model[0].weight.data, codes)


def test_a_failed_attach_gives_the_flag_back() -> None:
    model = quantised()
    with pytest.raises(ll.TargetError):
        ll.attach(model, ll.PiSSAConfig(r=65))
    assert getattr(model[0], FLAG) is True


def test_prepare_is_for_good() -> None:
    model = quantised()
    assert ll.prepare(model) == 1
    assert ll.prepare(model) == 0
    ll.attach(model, ll.LoRAConfig(r=4)).detach()
    assert getattr(model[0], FLAG) is False


def test_what_cannot_be_put_back_is_refused() -> None:
    model = quantised()
    rearrange(model[0])
    model[0].weight.quant_state.original_qshape = (7,)
    with pytest.raises(
        ll.ModelStateError, match=r"0 \(bitsandbytes 4-bit\) was rearranged .* call ll.prepare\(model\) before"
    ):
        ll.attach(model, ll.LoRAConfig(r=4))
    assert not ll.adapters(model)


@pytest.mark.parametrize("kind", ["LinearNF4", "LinearFP4", "Derived"])
def test_classes_derived_from_bitsandbytes_are_kept_unpacked(kind: str) -> None:
    model = nn.Sequential(make(kind))
    codes = model[0].weight.data.clone()
    rearrange(model[0])
    ll.attach(model, ll.LoRAConfig(r=4))
    assert torch.equal(model[0].weight.data, codes)
    assert getattr(model[0], FLAG) is False
    assert storage_of(model[0]) == ("bnb-fp4" if kind == "LinearFP4" else "bnb-nf4")
    x = torch.randn(2, 64, requires_grad=True)
    model.eval()(x).square().sum().backward()
    base = nn.functional.linear(x, dense(model[0]), model[0].bias).square().sum()
    torch.testing.assert_close(x.grad, torch.autograd.grad(base, x)[0], rtol=1e-3, atol=1e-3)


def test_classes_of_others_with_that_name_are_let_alone() -> None:
    class Linear4bit(nn.Linear):
        support_avx512bf16_for_cpu = True

    model = nn.Sequential(Linear4bit(4, 4))
    ll.attach(model, ll.LoRAConfig(r=2))
    assert getattr(model[0], FLAG) is True
    assert ll.prepare(model) == 0


# --- dry runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_coverage_leaves_the_layers_alone(nested: bool, packed: bool) -> None:
    model = quantised(nested).eval()
    if packed:
        rearrange(model[0])
    before = snapshot(model)
    assert ll.coverage(model, torch.randn(2, 64)).silent == ()
    assert snapshot(model) == before
    assert model[0].weight.device.type == "cpu"


def test_check_inputs_leaves_the_layers_alone() -> None:
    model = nn.Sequential(make(), nn.Linear(96, 8)).eval()
    model.unused = nn.Linear(8, 8)  # Sequential runs it, too
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="mat1 and mat2|shape"):
        ll.attach(model, ll.LoRAConfig(r=2), check_inputs=torch.randn(2, 65))
    assert snapshot(model) == before
    ll.attach(model, ll.LoRAConfig(r=2), check_inputs=torch.randn(2, 64))
    ll.detach(model)
    assert snapshot(model) == before
    assert type(model(torch.randn(2, 64, requires_grad=True))) is torch.Tensor


# --- probing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [ll.dense_weight, ll.sketch])
@pytest.mark.parametrize("nested", [False, True])
def test_reading_a_fresh_layer_leaves_it_as_it_is(nested: bool, read: Callable[[nn.Module], torch.Tensor]) -> None:
    model = quantised(nested).eval()
    before = snapshot(model)
    read(model[0])
    assert snapshot(model) == before


@pytest.mark.parametrize("nested", [False, True])
def test_reading_a_rearranged_layer_leaves_it_rearranged(nested: bool) -> None:
    model, fresh = quantised(nested).eval(), quantised(nested)
    rearrange(model[0])
    before = snapshot(model)
    torch.testing.assert_close(ll.dense_weight(model[0]), dense(fresh[0]), rtol=2**-8, atol=0)
    assert (ll.sketch(model[0]) - ll.sketch(fresh[0])).abs().max() < 1e-3
    assert snapshot(model) == before


@pytest.mark.parametrize("nested", [False, True])
def test_load_leaves_a_fresh_base_as_it_is_and_one_that_it_refuses_too(nested: bool, tmp_path: Path) -> None:
    ll.attach(quantised(nested), ll.PiSSAConfig(r=2)).save(tmp_path / "a.safetensors")
    model = quantised(nested).eval()
    before = snapshot(model)
    ll.load(model, tmp_path / "a.safetensors")
    ll.detach(model)
    assert snapshot(model) == before
    other = quantised(nested).eval()
    other[0].weight.data.bitwise_xor_(0x80)
    before = snapshot(other)
    with pytest.raises(ll.BaseMismatch):
        ll.load(other, tmp_path / "a.safetensors")
    assert snapshot(other) == before
    rearrange(other[0])
    before = snapshot(other)
    with pytest.raises(ll.BaseMismatch):
        ll.load(other, tmp_path / "a.safetensors")
    assert snapshot(other) == before


@pytest.mark.parametrize("nested", [False, True])
def test_import_peft_leaves_a_fresh_base_as_it_is(nested: bool, tmp_path: Path) -> None:
    source = quantised(nested)
    ll.attach(source, ll.DoRAConfig(r=2))
    ll.export_peft(source, tmp_path / "a")
    model = quantised(nested).eval()
    before = snapshot(model)
    ll.import_peft(model, tmp_path / "a")
    ll.detach(model)
    assert snapshot(model) == before


# --- put back: for good, all or nothing ----------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_what_was_put_back_is_not_rearranged_again(nested: bool) -> None:
    """bitsandbytes' own way back, which saving takes, would scramble it."""
    model = quantised(nested).eval()
    rearrange(model[0])
    ll.attach(model, ll.LoRAConfig(r=4)).detach()
    assert getattr(model[0], FLAG) is False
    expected = dense(model[0])
    x = torch.randn(2, 64)
    y = model(x)
    saved = model.state_dict()
    assert torch.equal(dense(model[0]), expected)
    assert torch.equal(model(x), y)
    other = quantised(nested)[0]
    stats = {k.removeprefix("0.weight."): v for k, v in saved.items() if k.startswith("0.weight.")}
    other.weight = bnb.nn.Params4bit.from_prequantized(saved["0.weight"], stats, device="cpu", module=other)
    assert torch.equal(dense(other), expected)


def test_a_failed_attach_gives_a_rearranged_layer_back() -> None:
    model = quantised(True)
    rearrange(model[0])
    before = snapshot(model)
    with pytest.raises(ll.TargetError):
        ll.attach(model, ll.PiSSAConfig(r=65))
    assert snapshot(model) == before


def test_unpacking_can_be_undone_and_both_repeated() -> None:
    model = quantised(True)
    rearrange(model[0])
    before = snapshot(model)
    plan = Unpacking(model)
    assert snapshot(model) == before
    plan.apply()
    plan.apply()
    assert snapshot(model) != before
    plan.undo()
    plan.undo()
    assert snapshot(model) == before


def test_all_are_put_back_or_none() -> None:
    model = nn.Sequential(make(sizes=(64, 128)), make(sizes=(128, 64)))
    for layer in model:
        rearrange(layer)
    model[1].weight.quant_state.original_qshape = (7,)
    before = snapshot(model)
    with pytest.raises(ll.ModelStateError, match=r"^1 \(bitsandbytes"):
        ll.prepare(model)
    with pytest.raises(ll.ModelStateError, match=r"^1 \(bitsandbytes"):
        ll.attach(model, ll.LoRAConfig(r=4))
    assert snapshot(model) == before


@pytest.mark.parametrize("packed", [False, True])
def test_prepare_within_the_life_of_an_adapter_is_for_good(packed: bool) -> None:
    model = quantised()
    if packed:
        rearrange(model[0])
    ll.attach(model, ll.LoRAConfig(r=4))
    ll.prepare(model)
    ll.detach(model)
    assert getattr(model[0], FLAG) is False
    ll.attach(model, ll.LoRAConfig(r=4)).detach()
    assert getattr(model[0], FLAG) is False


def test_layers_that_went_away_are_not_asked_to_rearrange() -> None:
    model = quantised()
    names = keep_unpacked(model)
    assert names == ["0"]
    model[0] = nn.Linear(64, 96)
    let_pack(model, [*names, "7"])
    assert not hasattr(model[0], FLAG)


class Interrupt(BaseException):
    pass


def interrupted_at(line: int, run: Callable[[], object]) -> bool:
    """Whether `run` came to its `line`-th line in the module that puts weights back, where it is interrupted."""
    left = [line]

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename != four_bit_packing.__file__:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except Interrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def half_rearranged() -> Any:
    model = nn.Sequential(make(sizes=(64, 128)), make(sizes=(128, 64)), make())
    rearrange(model[1])
    return model


def test_an_interrupted_prepare_leaves_it_as_before_or_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(four_bit_packing, "_check_around", lambda model: None)  # slow, and touches nothing
    expected = [dense(make(sizes=sizes)) for sizes in ((64, 128), (128, 64), (64, 96))]
    line, outcomes = 0, set()
    while True:
        line += 1
        model = half_rearranged()
        before = snapshot(model)
        if not interrupted_at(line, functools.partial(ll.prepare, model)):
            break
        if snapshot(model) == before:
            outcomes.add("before")
            continue
        outcomes.add("done")
        for layer, weight in zip(model, expected, strict=True):
            assert getattr(layer, FLAG) is False
            torch.testing.assert_close(dense(layer), weight, rtol=2**-8, atol=0)
            assert layer.quant_state is layer.weight.quant_state
    assert line > 30
    assert outcomes == {"before", "done"}


def test_an_interrupted_undo_is_repeated() -> None:
    model = half_rearranged()
    before = snapshot(model)
    plan = Unpacking(model)
    line = 1
    plan.apply()
    while interrupted_at(line, plan.undo):
        plan.undo()
        assert snapshot(model) == before
        plan.apply()
        line += 1
    assert line > 10


# --- 4-bit layers around the model -----------------------------------------------------------------------------------


def test_a_part_of_a_model_with_4bit_layers_outside_of_it() -> None:
    """What they pass back to the adapters would be wrong once they are rearranged."""
    whole = nn.Sequential(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), nn.ModuleDict({"head": make()}))
    with pytest.raises(
        ll.ModelStateError,
        match=r"the Sequential is a part of a Sequential with 1 4-bit layer outside of it \(1\.head\), .*"
        r"call ll\.prepare with the Sequential first, or attach to it",
    ):
        ll.attach(whole[0], ll.LoRAConfig(r=2))
    assert not ll.adapters(whole[0])
    ll.attach(whole, ll.LoRAConfig(r=2)).detach()
    assert ll.prepare(whole) == 1
    ll.attach(whole[0], ll.LoRAConfig(r=2))


def test_layers_outside_do_not_matter_where_nothing_rearranges_them(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = nn.Sequential(nn.Sequential(nn.Linear(64, 64)), make())
    unrelated = nn.Sequential(make())
    with monkeypatch.context() as patch:
        patch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)
        ll.attach(whole[0], ll.LoRAConfig(r=2)).detach()
    alone = nn.Sequential(nn.Linear(64, 64))
    held = {"model": alone, "other": unrelated}
    ll.attach(held["model"], ll.LoRAConfig(r=2))
    inner = nn.Sequential(nn.Sequential(make()), nn.ReLU())
    ll.attach(inner[0], ll.LoRAConfig(r=2))
