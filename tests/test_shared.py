"""Tensors that layers share: one in memory, one in the file, on the module that `attach` was given."""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite_core.attached.tensors import shared as making

from .models import net, token_ids

NAMES = ["vera", "tied_lora"]
FILE = "adapter.safetensors"


def config(name: str, **fields: Any) -> ll.AdapterConfig:
    return ll.LoraLiteConfig(variant=name, r=4, **fields)


def moved(model: nn.Module, name: str = "default") -> Tensor:
    generator = torch.Generator().manual_seed(5)
    for parameter in ll.adapters(model)[name].parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    y: Tensor = model(token_ids())
    return y.detach()


def on_model(model: nn.Module) -> set[str]:
    return {name for name in (*model._parameters, *model._buffers) if name.startswith("lora_")}


ALL = {"lora_A_4x16", "lora_B_16x4", "lora_B_24x4", "lora_A_4x24"}


@pytest.mark.parametrize("name", NAMES)
def test_layers_of_one_size_have_one_tensor(name: str) -> None:
    model = net()
    adapter = ll.attach(model, config(name))
    assert on_model(model) == ALL
    targets = adapter.layers()
    same = [targets[f"layers.{i}.self_attn.{which}_proj"] for i in (0, 1) for which in "qvo"]
    assert len({id(target.params["lora_A"]) for target in same}) == 1
    shared = [key for key, _ in adapter.named_tensors() if "." not in key]
    assert set(shared) == ALL
    assert len(shared) == len(ALL)
    own = sum(t.numel() for key, t in adapter.named_tensors() if "." in key)
    trained = own + (sum(t.numel() for key, t in adapter.named_tensors() if "." not in key) if name != "vera" else 0)
    assert f"{trained:,} trainable parameters" in repr(adapter)
    parameters = list(adapter.parameters())
    assert len(parameters) == len({id(p) for p in parameters})
    assert len(list(model.named_parameters())) == len(list(model.named_parameters(remove_duplicate=False)))
    groups = ll.param_groups(model, lr=1e-3, b_ratio=4.0)
    assert sum(p.numel() for group in groups for p in group["params"]) == trained
    torch.optim.AdamW(groups)
    if name == "tied_lora":
        b_side = next(group["params"] for group in groups if group["name"] == "B side")
        assert {id(p) for p in b_side} == {id(model.lora_B_16x4), id(model.lora_B_24x4)}


@pytest.mark.parametrize("name", NAMES)
def test_files_hold_them_once(name: str, tmp_path: Path) -> None:
    model = net()
    ll.attach(model, config(name), name="style")
    expected = moved(model, "style")
    ll.save(model, tmp_path / FILE, name="style")
    header = ll.inspect(tmp_path / FILE)
    assert {key for key in header.tensors if "." not in key} == ALL
    ll.detach(model)
    assert not on_model(model)
    for target, called in ((model, "style"), (net(), "default"), (net(), "other")):
        ll.load(target, tmp_path / FILE, name=called)
        torch.testing.assert_close(target(token_ids()), expected)
        suffix = "" if called == "default" else f"__{called}"
        assert on_model(target) == {key + suffix for key in ALL}


def test_memory_and_file_grow_by_vectors_only(tmp_path: Path) -> None:
    """Of VeRA: a block more is six layers more, each with r + d_out numbers."""
    sizes, numbers = [], []
    for blocks in (2, 4, 6):
        model = net(blocks=blocks)
        adapter = ll.attach(model, config("vera"))
        ll.save(model, tmp_path / FILE)
        numbers.append(sum(t.numel() for _, t in adapter.named_tensors()))
        sizes.append(sum(torch.Size(s).numel() for _, s in ll.inspect(tmp_path / FILE).tensors.values()))
    layer = [4 + d_out for d_out in (16, 16, 16, 24, 16)]
    assert sizes == numbers
    assert [b - a for a, b in itertools.pairwise(numbers)] == [2 * sum(layer)] * 2


@pytest.mark.parametrize("name", NAMES)
def test_copies_of_the_model_and_of_one_block(name: str) -> None:
    model = net()
    ll.attach(model, config(name))
    expected = moved(model)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    of_block = model.layers[0](x).detach()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(copied(token_ids()), expected)
        moved(copied)
        assert not torch.equal(copied(token_ids()), expected)
        torch.testing.assert_close(model(token_ids()), expected)
        target = next(iter(ll.adapters(copied)["default"].layers().values()))
        assert any(target.params["lora_A"] is p for p in copied.parameters())
    block = copy.deepcopy(model.layers[0])
    torch.testing.assert_close(block(x), of_block)
    size = len(pickle.dumps(model.layers[0]))
    assert size < 0.8 * len(pickle.dumps(model))
    torch.testing.assert_close(pickle.loads(pickle.dumps(model.layers[0]))(x), of_block)
    with torch.no_grad():
        for parameter in ll.adapters(model)["default"].parameters():
            parameter.zero_()
    torch.testing.assert_close(block(x), of_block)  # the copy of the block has tensors of its own


@pytest.mark.parametrize("name", NAMES)
def test_moved_to_another_dtype_compiled_and_merged(name: str) -> None:
    model = net()
    ll.attach(model, config(name))
    expected = moved(model)
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(token_ids()), expected)
    torch.testing.assert_close(copy.deepcopy(model).double()(token_ids()), expected.double(), rtol=1e-4, atol=1e-4)
    with ll.disabled(model), torch.no_grad():
        base = model(token_ids())
    torch.testing.assert_close(base, net()(token_ids()))
    with ll.merged(model):
        torch.testing.assert_close(model(token_ids()), expected, rtol=1e-4, atol=1e-5)
    ll.merge(model)
    torch.testing.assert_close(model(token_ids()), expected, rtol=1e-4, atol=1e-5)
    assert not on_model(model)


def test_gradients_come_from_all_layers() -> None:
    model = net().double()
    ll.attach(model, config("tied_lora"))
    moved(model)
    apart = copy.deepcopy(model)
    targets = ll.adapters(apart)["default"].layers()
    grads = []
    for target in targets.values():  # as if each layer had its own
        if target.d_in == 24:
            continue
        shared = target.shared["lora_A"]
        own = nn.Parameter(target.params["lora_A"].detach().clone())
        target.shared["lora_A"] = shared._replace(held={shared.attribute: own})
        grads.append(own)
    apart(token_ids()).square().mean().backward()
    model(token_ids()).square().mean().backward()
    torch.testing.assert_close(
        model.lora_A_4x16.grad, torch.stack([g.grad for g in grads if g.grad is not None]).sum(0)
    )


def test_two_adapters_never_share() -> None:
    model = net()
    one, two = (ll.attach(model, config("tied_lora"), name=name) for name in ("one", "two"))
    shared = [{id(t) for key, t in a.named_tensors() if "." not in key} for a in (one, two)]
    assert not shared[0] & shared[1]
    assert not torch.equal(model.lora_A_4x16__one, model.lora_A_4x16__two)
    two.detach()
    assert on_model(model) == {f"{key}__one" for key in ALL}


def test_the_start_depends_on_key_and_shape_alone() -> None:
    model, few = net(), net()
    ll.attach(model, config("vera"))
    ll.attach(few, config("vera", target_names=("down_proj",), layers=(1,)))
    assert torch.equal(model.lora_A_4x24, few.lora_A_4x24)
    assert on_model(few) == {"lora_A_4x24", "lora_B_16x4"}
    other = net()
    ll.attach(other, config("vera"), seed=1)
    assert not torch.equal(model.lora_A_4x16, other.lora_A_4x16)


def test_on_meta_first(tmp_path: Path) -> None:
    model = net().to("meta")
    adapter = ll.attach(model, config("vera"))
    assert model.lora_A_4x16.is_meta
    model.load_state_dict(net().state_dict(), strict=False, assign=True)
    adapter.initialize()
    there = net()
    ll.attach(there, config("vera"))
    assert torch.equal(model.lora_A_4x16, there.lora_A_4x16)


def bent(**functions: Any) -> SimpleNamespace:
    """A variant that shares lora_s (3), with these functions besides."""

    class Config(ll.AdapterConfig):
        variant = "bent"

    @ll.hookimpl
    def param_specs(d_out: int) -> dict[str, ll.ParamSpec]:
        return {"lora_s": ll.ParamSpec((3,), shared="s"), "lora_h": ll.ParamSpec((d_out,))}

    @ll.hookimpl
    def forward(y: Tensor, params: dict[str, Tensor]) -> Tensor:
        return y + params["lora_s"].sum().to(y.dtype) + params["lora_h"].to(y.dtype)

    given = {"Config": Config, "param_specs": param_specs, "forward": forward}
    return SimpleNamespace(**{**given, **{name: ll.hookimpl(f) for name, f in functions.items()}})


def test_init_reads_and_group_init_writes(registered: Any) -> None:
    def init(params: dict[str, Tensor]) -> None:
        assert params["lora_s"].shape == (3,)

    def group_init(targets: Any) -> None:
        for target in targets:
            target.params["lora_s"].fill_(2)

    variant = bent(init=init, group_init=group_init)
    registered(variant, name="bent")
    model = net()
    ll.attach(model, variant.Config())
    assert model.lora_s_3.tolist() == [2, 2, 2]

    def writes(params: dict[str, Tensor]) -> None:
        params["lora_s"].fill_(2)

    variant = bent(init=writes)
    registered(variant, name="bent")
    with pytest.raises(
        ll.BrokenPlugin, match=r"init of variant 'bent' wrote params\['lora_s'\], which other layers share"
    ):
        ll.attach(net(), variant.Config())


def test_freed_with_the_last_layer_that_uses_it(registered: Any) -> None:
    def param_specs(d_out: int, name: str) -> dict[str, ll.ParamSpec]:
        return {"lora_s": ll.ParamSpec((1 + len(name.split(".")),), shared="s"), "lora_h": ll.ParamSpec((d_out,))}

    def group_init(targets: Any) -> None:
        for target in targets:
            if len(target.name.split(".")) == 4:
                target.drop()

    variant = bent(param_specs=param_specs, group_init=group_init)
    registered(variant, name="bent")
    model = net()
    ll.attach(model, variant.Config())
    assert on_model(model) == {"lora_s_4"}


def test_reconfigured_to_other_tensors(registered: Any) -> None:
    """A target may leave a shared tensor, and the last one that does frees it."""

    class Config(ll.RankConfig):
        variant = "bent"

    def param_specs(cfg: Any, d_out: int) -> dict[str, ll.ParamSpec]:
        shared = {} if cfg.r == 1 else {"lora_s": ll.ParamSpec((cfg.r,), shared="s")}
        return {**shared, "lora_h": ll.ParamSpec((d_out,))}

    def group_init(targets: Any) -> None:
        for target in targets:
            target.reconfigure(r=1 if "proj" in target.name else 3)
            assert ("lora_s" in target.params) == (target.cfg.r == 3)

    def forward(y: Tensor, params: dict[str, Tensor]) -> Tensor:
        return y + params["lora_h"].to(y.dtype)

    variant = bent(param_specs=param_specs, group_init=group_init, forward=forward)
    variant.Config = Config
    registered(variant, name="bent")
    model = net()
    adapter = ll.attach(model, Config(r=2))
    assert not on_model(model)
    assert not any(target.shared for target in adapter.layers().values())


def test_one_key_is_one_kind(registered: Any) -> None:
    def param_specs(d_in: int) -> dict[str, ll.ParamSpec]:
        return {"lora_s": ll.ParamSpec((3,), shared="s", trainable=d_in == 16), "lora_h": ll.ParamSpec((1,))}

    variant = bent(param_specs=param_specs)
    registered(variant, name="bent")
    model = net()
    with pytest.raises(
        ll.BrokenPlugin, match="layers.0.down_proj shares lora_s_3 with other layers and declares another"
    ):
        ll.attach(model, variant.Config())
    assert not on_model(model)
    assert not ll.adapters(model)


@pytest.mark.parametrize("key", ["a b", "a__b", "lora_A", "1"])
def test_keys_are_parts_of_names(key: str) -> None:
    with pytest.raises(ll.ConfigError, match="the key becomes a part of a name"):
        ll.ParamSpec((3,), shared=key)


def test_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by a layer that says it is elsewhere: a frozen tensor has a copy there, a trained one is refused."""
    elsewhere = torch.device("meta")
    where = making.layer_device
    model = net()
    away = model.layers[1].self_attn.q_proj
    monkeypatch.setattr(making, "layer_device", lambda layer: elsewhere if layer is away else where(layer))
    ll.attach(model, config("vera"))
    assert model.lora_A_4x16_meta.is_meta
    assert not model.lora_A_4x16.is_meta
    with pytest.raises(
        ll.TargetError, match="layers.1.self_attn.q_proj is on meta, and lora_A_4x16, which is trained and"
    ):
        ll.attach(model, config("tied_lora"), name="tied")
    ll.detach(model)
    assert not on_model(model)


def test_vera_is_that_of_peft() -> None:
    """Whose pair is one of the largest size, of which each layer takes a part."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 16))
    cfg = peft.VeraConfig(r=4, target_modules=["0", "2"], d_initial=0.1, vera_dropout=0.0)
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), cfg)
    adapter = ll.attach(base, config("vera"))
    A, B = theirs.base_model.vera_A["default"], theirs.base_model.vera_B["default"]
    with torch.no_grad():
        for name, target in adapter.layers().items():
            layer = theirs.base_model.model.get_submodule(name)
            target.params["lora_A"].copy_(A[:, : target.d_in])
            target.params["lora_B"].copy_(B[: target.d_out])
            layer.vera_lambda_b["default"].normal_()
            layer.vera_lambda_d["default"].normal_()
            target.params["lora_b"].copy_(layer.vera_lambda_b["default"])
            target.params["lora_d"].copy_(layer.vera_lambda_d["default"] - 0.1)
    x = torch.randn(5, 24)
    torch.testing.assert_close(base(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiled_by_the_first_call_of_a_process() -> None:
    code = """
import torch, lora_lite as ll
from torch import nn
model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
ll.attach(model, ll.LoraLiteConfig(variant="vera", r=2))
x = torch.randn(3, 8)
compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
y = compiled(x)
torch.testing.assert_close(y, model(x))
y.sum().backward()
assert all(p.grad is not None for p in ll.adapters(model)["default"].parameters())
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
