"""save, load, inspect: what a file holds, and what a wrong one gets."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lora_lite as ll
from lora_lite_core.files.adapter_file import HEADER_TENSOR

from .models import HIDDEN, net, snapshot, token_ids, train

CONFIGS = [
    ll.LoRAConfig(r=2, rank_pattern={"q_proj": 3}),
    ll.PiSSAConfig(r=2, alpha=3.0),
    ll.IA3Config(),
    ll.IA3FFConfig(target_names="down_proj"),
]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A trained PiSSA adapter of net()."""
    model = net()
    train(model, ll.attach(model, ll.PiSSAConfig(r=2, target_names=("q_proj",)), seed=5))
    path = tmp_path / "adapter.safetensors"
    ll.save(model, path)
    return path


def rewritten(path: Path, *, tensors: Any = None, **changes: Any) -> Path:
    """The file with other tensors, or other fields in its header."""
    with path.open("rb") as stream:
        header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    metadata = header["__metadata__"]
    metadata["adapter"] = json.dumps({**json.loads(metadata["adapter"]), **changes})
    save_file(load_file(path) if tensors is None else tensors, path, metadata=metadata)
    return path


def refusal(error: type[Exception], path: Path, model: nn.Module | None = None, **options: Any) -> str:
    model = net() if model is None else model
    before = snapshot(model)
    with pytest.raises(error) as caught:
        ll.load(model, path, **options)
    assert snapshot(model) == before
    return str(caught.value)


@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda cfg: cfg.variant)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_round_trip(cfg: ll.AdapterConfig, dtype: torch.dtype, bias: bool, tmp_path: Path) -> None:
    model = net(dtype, bias=bias)
    base = model(token_ids())
    adapter = ll.attach(model, cfg, name="style")
    train(model, adapter)
    trained = model(token_ids())
    assert not torch.equal(trained, base)
    path = tmp_path / "adapter.safetensors"
    adapter.save(path)
    adapter.detach()
    assert torch.equal(model(token_ids()), base)
    for target in (model, net(dtype, bias=bias)):
        loaded = ll.load(target, path, name="other")
        assert torch.equal(target(token_ids()), trained)
        assert loaded.cfg == cfg
        train(target, loaded)  # it goes on training
        assert not torch.equal(target(token_ids()), trained)


def test_what_a_file_says(saved: Path) -> None:
    file = ll.inspect(saved)
    assert file.variant == "pissa"
    assert file.config["r"] == 2
    assert file.seed == 5
    assert file.plugin["distribution"] == "lora-lite-svd"
    assert list(file.targets) == [f"layers.{i}.self_attn.q_proj" for i in range(2)]
    target = file.targets["layers.0.self_attn.q_proj"]
    assert (target["d_in"], target["d_out"], target["storage"]) == (HIDDEN, HIDDEN, "dense")
    assert len(target["fingerprint"]) == 17
    assert set(file.tensors) == {
        f"layers.{i}.self_attn.q_proj.lora_{n}" for i in range(2) for n in ("A0", "B0", "dA", "dB")
    }
    assert file.tensors["layers.0.self_attn.q_proj.lora_dA"] == ("F32", (2, HIDDEN))
    text = str(file)
    assert "pissa (lora-lite-svd 0.1.0), 2 layers, 8 tensors, 256 numbers" in text
    assert "layers.0.self_attn.q_proj  16 → 16  dense  yes" in text
    assert json.loads(json.dumps(file.to_dict()))["tensors"]["layers.0.self_attn.q_proj.lora_dA"]["shape"] == [
        2,
        HIDDEN,
    ]


def test_bare_names_whatever_the_adapter_was_called(tmp_path: Path) -> None:
    model = net()
    ll.attach(model, ll.LoRAConfig(r=2, target_names="up_proj"), name="style").save(tmp_path / "a.safetensors")
    assert set(ll.inspect(tmp_path / "a.safetensors").tensors) == {
        f"layers.{i}.up_proj.lora_{n}" for i in range(2) for n in "AB"
    }


def test_load_draws_nothing_and_is_not_trainable_on_request(saved: Path) -> None:
    state = torch.random.get_rng_state()
    model = net()
    adapter = ll.load(model, saved, trainable=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert list(adapter.parameters()) == []
    assert not any(p.requires_grad for p in model.parameters())
    ll.detach(model)
    assert all(p.requires_grad for p in model.parameters())


def test_patterns_are_not_run_again(saved: Path) -> None:
    model = net(blocks=3)  # a third q_proj that the pattern would match
    model.layers[0], model.layers[1] = net().layers
    assert ll.load(model, saved).targets == tuple(f"layers.{i}.self_attn.q_proj" for i in range(2))


def test_values_are_cast_to_the_config_s_dtype(tmp_path: Path) -> None:
    model = net()
    train(model, ll.attach(model, ll.LoRAConfig(r=2, dtype="bfloat16")))
    ll.save(model, tmp_path / "a.safetensors")
    path = rewritten(tmp_path / "a.safetensors", config=ll.LoRAConfig(r=2).to_dict())
    fresh = net()
    ll.load(fresh, path)
    assert fresh.layers[0].up_proj.lora_B.dtype == torch.float32
    assert torch.equal(fresh.layers[0].up_proj.lora_B, model.layers[0].up_proj.lora_B.float())


def test_tensors_that_share_storage_or_are_not_contiguous_are_saved(
    registered: Any, toy: SimpleNamespace, tmp_path: Path
) -> None:
    registered(toy, name="toy")
    model = net()
    ll.attach(model, toy.Config(target_names="up_proj"))
    model.layers[1].up_proj.lora_h = model.layers[0].up_proj.lora_h
    model.layers[0].up_proj.lora_h.data = torch.randn(2, model.layers[0].up_proj.out_features).T[:, 0]
    ll.save(model, tmp_path / "a.safetensors")
    assert len(load_file(tmp_path / "a.safetensors")) == 2


def test_tensors_that_are_not_saved_are_made_by_init(registered: Any, toy: SimpleNamespace, tmp_path: Path) -> None:
    drawn = []

    @ll.hookimpl
    def param_specs(d_out: int) -> dict[str, ll.ParamSpec]:
        def draw(tensor: torch.Tensor, generator: torch.Generator) -> None:
            drawn.append(tensor.normal_(generator=generator))

        return {
            "lora_h": ll.ParamSpec((d_out,), init=draw),
            "lora_norm": ll.ParamSpec((d_out,), as_buffer=True, persistent=False),
            "lora_index": ll.ParamSpec(
                (2,), init=lambda t, g: t.fill_(7), trainable=False, dtype=torch.int64, as_buffer=True
            ),
        }

    @ll.hookimpl
    def init(layer: nn.Module, params: dict[str, torch.Tensor]) -> None:
        params["lora_norm"].copy_(ll.dense_weight(layer).norm(dim=1))

    @ll.hookimpl
    def forward(y: torch.Tensor, params: dict[str, torch.Tensor]) -> torch.Tensor:
        return y + params["lora_h"] * params["lora_norm"] * params["lora_index"].sum()

    toy.param_specs, toy.init, toy.forward = param_specs, init, forward
    registered(toy, name="toy")
    model = net()
    train(model, ll.attach(model, toy.Config(target_names="up_proj")))
    ll.save(model, tmp_path / "a.safetensors")
    count = len(drawn)
    assert {key.rpartition(".")[2] for key in ll.inspect(tmp_path / "a.safetensors").tensors} == {
        "lora_h",
        "lora_index",
    }
    fresh = net()
    ll.load(fresh, tmp_path / "a.safetensors")
    assert len(drawn) == count, "load must draw nothing"
    assert torch.equal(fresh(token_ids()), model(token_ids()))
    tensors = load_file(tmp_path / "a.safetensors")
    tensors["layers.0.up_proj.lora_index"] = tensors["layers.0.up_proj.lora_index"].float()
    message = refusal(ll.AdapterFileError, rewritten(tmp_path / "a.safetensors", tensors=tensors))
    assert "layers.0.up_proj.lora_index is torch.float32, variant 'toy' needs torch.int64" in message


# --- saving ------------------------------------------------------------------------------------------------------


def test_save_writes_the_whole_file_or_none(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()
    model = net()
    ll.attach(model, ll.LoRAConfig())

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ll.AdapterFileError, match="cannot be written: No space left on device"):
        ll.save(model, saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_saved_file_has_the_ordinary_permissions(saved: Path) -> None:
    ordinary = saved.with_name("ordinary")
    ordinary.touch()
    assert saved.stat().st_mode == ordinary.stat().st_mode


def test_save_to_a_wrong_place(tmp_path: Path) -> None:
    model = net()
    ll.attach(model, ll.LoRAConfig())
    with pytest.raises(
        ll.AdapterFileError,
        match=r"adapters are saved as .safetensors, not 'a.pt'; type save\(model, '.*a.safetensors'\)",
    ):
        ll.save(model, tmp_path / "a.pt")
    with pytest.raises(ll.AdapterFileError, match="nowhere does not exist; make it first"):
        ll.save(model, tmp_path / "nowhere" / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


# --- loading the wrong thing -------------------------------------------------------------------------------------


def test_missing_file(tmp_path: Path) -> None:
    assert "none.safetensors cannot be read: No such file" in refusal(
        ll.AdapterFileError, tmp_path / "none.safetensors"
    )


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    message = refusal(ll.AdapterFileError, saved)
    assert "is not a safetensors file, or its beginning is damaged" in message or "is cut short or damaged: " in message


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    path.write_bytes(b"PK\x03\x04" + bytes(range(250)))
    assert "is not a safetensors file, or its beginning is damaged" in refusal(ll.AdapterFileError, path)
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(2, 2)}, path)
    message = refusal(ll.AdapterFileError, path)
    assert (
        "is a safetensors file but not a lora-lite adapter\n  its 1 tensor: base_model.model.q_proj.lora_A.weight"
        in message
    )
    assert f"this is PEFT's: import_peft(model, '{tmp_path}')" in message
    save_file({"x": torch.zeros(1)}, path)
    assert "import_peft" not in refusal(ll.AdapterFileError, path)
    save_file({"x": torch.zeros(1)}, path, metadata={"format": "lora-lite", "format_version": "9"})
    assert "has adapter format 9, this lora-lite-core reads 1; type: pip install --upgrade" in refusal(
        ll.AdapterFileError, path
    )
    save_file({"x": torch.zeros(1)}, path, metadata={"format": "lora-lite", "format_version": "1", "adapter": "{}"})
    assert "has a damaged lora-lite header" in refusal(ll.AdapterFileError, path)


def test_a_header_that_stands_among_the_tensors_as_well(saved: Path) -> None:
    def with_header(text: str) -> Path:
        header = torch.tensor(list(text.encode()), dtype=torch.uint8)
        return rewritten(saved, tensors={**load_file(saved), HEADER_TENSOR: header})

    with safe_open(saved, "pt") as file:
        text = file.metadata()["adapter"]
    assert HEADER_TENSOR not in ll.inspect(with_header(text)).tensors
    ll.load(net(), saved)
    for other in (text.replace('"seed": 5', '"seed": 6'), "", "{"):
        message = refusal(ll.AdapterFileError, with_header(other))
        assert message.endswith("has been edited: its header and lora_lite.header differ; save the adapter anew")


def test_missing_and_unexpected_tensors(saved: Path) -> None:
    tensors = load_file(saved)
    tensors["layers.0.self_attn.q_proj.lora_C"] = tensors.pop("layers.0.self_attn.q_proj.lora_dA")
    message = refusal(ll.AdapterFileError, rewritten(saved, tensors=tensors))
    assert "does not hold the tensors of variant 'pissa'" in message
    assert "missing: layers.0.self_attn.q_proj.lora_dA" in message
    assert "unexpected: layers.0.self_attn.q_proj.lora_C" in message


def test_wrong_shape(saved: Path) -> None:
    tensors = load_file(saved)
    tensors["layers.1.self_attn.q_proj.lora_dA"] = torch.zeros(3, HIDDEN)
    message = refusal(ll.AdapterFileError, rewritten(saved, tensors=tensors))
    assert "layers.1.self_attn.q_proj.lora_dA has shape (3, 16), this model needs (2, 16)" in message


def test_missing_target(saved: Path) -> None:
    message = refusal(ll.AdapterFileError, saved, net(blocks=1))
    assert (
        "1 of 2 targets are not in this Net: layers.1.self_attn.q_proj; did you mean 'layers.0.self_attn.q_proj'?"
        in message
    )


def test_target_of_another_size(saved: Path) -> None:
    model = net()
    model.layers[0].self_attn.q_proj = nn.Linear(HIDDEN, 7)
    message = refusal(ll.BaseMismatch, saved, model)
    assert "layers.0.self_attn.q_proj is 16 → 7 in this Net, but 16 → 16 in the model that" in message


def test_target_that_is_no_linear_layer(saved: Path) -> None:
    model = net()
    model.layers[0].self_attn.q_proj = nn.Identity()
    assert "layers.0.self_attn.q_proj is a Identity, which is no layer that an adapter can go on" in refusal(
        ll.UnsupportedLayer, saved, model
    )


def test_config_from_another_version(saved: Path) -> None:
    message = refusal(ll.AdapterFileError, rewritten(saved, config={"variant": "pissa", "r": 2, "shiny": 1}))
    assert "its config does not fit variant 'pissa' of lora-lite-svd 0.1.0" in message
    assert "has no field 'shiny'" in message


def test_missing_plugin(saved: Path) -> None:
    path = rewritten(saved, variant="shiny", plugin={"distribution": "lora-lite-shiny", "version": "1.2"})
    message = refusal(ll.MissingPlugin, path)
    assert message.endswith("needs variant 'shiny' of lora-lite-shiny 1.2; type: pip install lora-lite-shiny")
    path = rewritten(saved, plugin={"distribution": "", "version": ""})
    assert "needs variant 'shiny', which was registered by hand; register it first" in refusal(ll.MissingPlugin, path)


def test_name_already_attached(saved: Path) -> None:
    model = net()
    ll.load(model, saved)
    assert "an adapter called 'default' is attached already" in refusal(ll.AdapterNameError, saved, model)
    ll.load(model, saved, name="twice")


def test_compiled_model(saved: Path) -> None:
    assert "is compiled" in refusal(ll.ModelStateError, saved, torch.compile(net(), backend="eager"))


def test_unknown_reaction(saved: Path) -> None:
    assert "on_base_mismatch='warning'; give 'error', 'warn' or 'ignore'" in refusal(
        ll.ConfigError, saved, on_base_mismatch="warning"
    )


# --- the base ----------------------------------------------------------------------------------------------------


def changed(change: str) -> nn.Module:
    model = net()
    weight = model.layers[1].self_attn.q_proj.weight.data
    if change == "another seed":
        return net(seed=1)
    if change == "rows permuted":
        weight.copy_(weight[torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(0))])
    if change == "sign":
        weight.neg_()
    if change == "1 % fine-tune":
        weight.add_(
            0.01 * weight.square().mean().sqrt() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        )
    return model


@pytest.mark.parametrize("change", ["another seed", "rows permuted", "sign", "1 % fine-tune"])
def test_another_base_is_refused(saved: Path, change: str) -> None:
    message = refusal(ll.BaseMismatch, saved, changed(change))
    assert "was made on another base model: layers." in message
    assert "load it on the model it was trained on; on_base_mismatch='warn' loads it all the same" in message
    if change != "another seed":
        assert "1 of 2 layers in all" in message
    model = changed(change)
    with pytest.warns(UserWarning, match="was made on another base model"):
        ll.load(model, saved, on_base_mismatch="warn")
    ll.load(changed(change), saved, on_base_mismatch="ignore")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_base_in_another_dtype_is_accepted(saved: Path, dtype: torch.dtype) -> None:
    ll.load(net().to(dtype), saved)


def test_an_adapter_that_assumes_nothing_fits_any_base_of_its_shape(tmp_path: Path) -> None:
    model = net()
    ll.attach(model, ll.LoRAConfig()).save(tmp_path / "a.safetensors")
    ll.load(net(seed=1), tmp_path / "a.safetensors")


def test_across_storages_the_tolerance_is_wider_and_said(saved: Path) -> None:
    targets = ll.inspect(saved).targets
    for target in targets.values():
        target["storage"] = "bnb-nf4"
    path = rewritten(saved, targets=targets)
    with pytest.warns(
        UserWarning, match="trained on bnb-nf4 weights and is opened on dense ones: another model would be noticed"
    ):
        ll.load(changed("1 % fine-tune"), path)
    assert "was made on another base model" in refusal(ll.BaseMismatch, path, net(seed=1))


def test_saving_twice_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    model = net()
    train(model, ll.attach(model, ll.DoRAConfig(r=2, train_modules="lm_head")))
    files = [tmp_path / f"{number}.safetensors" for number in range(5)]
    for path in files:
        ll.save(model, path)
    assert len({path.read_bytes() for path in files}) == 1
    assert load_file(files[0]).keys() == ll.inspect(files[0]).tensors.keys()


def test_whole_modules_are_written_by_name_and_no_pattern_of_a_file_runs(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    model = net()
    ll.attach(model, ll.LoRAConfig(r=2, train_modules="l._head")).save(path)
    assert ll.inspect(path).config["train_modules"] == ["^lm_head$"]
    bomb = "(a*)*$|" + "(.*)*" * 20 + "x"
    rewritten(path, config={**ll.inspect(path).config, "train_modules": [bomb]})
    loaded = ll.load(net(), path)
    assert "lm_head.weight" in dict(loaded.named_tensors())
    loaded.save(path)
    assert ll.inspect(path).config["train_modules"] == ["^lm_head$"]


def test_a_file_that_lost_a_part_of_a_whole_module(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    ll.attach(model, ll.LoRAConfig(r=2, target_names="^0$", train_modules="^1$")).save(path)
    rest = {key: tensor for key, tensor in load_file(path).items() if not key.startswith("1.1")}
    rewritten(path, tensors=rest)
    ll.detach(model)
    with pytest.raises(ll.AdapterFileError, match=r"missing: 1.1.weight, 1.1.bias"):
        ll.load(model, path)


def test_a_name_of_the_hub_without_the_package_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_lite_core.files import folders

    monkeypatch.setattr(folders, "entries", lambda group, objects: [])
    with pytest.raises(ll.AdapterFileError) as caught:
        ll.load(net(), "user/name")
    assert str(caught.value) == (
        "there is no file or folder user/name here\n  if it is a repository on the Hugging Face hub, type: pip install "
        "lora-lite-transformers, and load it again"
    )
    with pytest.raises(ll.AdapterFileError, match="No such file"):
        ll.load(net(), "user/name.safetensors")
