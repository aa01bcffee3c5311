"""PEFT's own formats: what is written here is opened by peft, what peft has saved is opened here, with the same logits."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_lite as ll

from .test_export import Mixed, checked_with_peft, gpt2, llama, logits, mixed_outputs, moved, opened_by_peft
from .test_variants import config

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's and transformers' own

OURS: dict[str, ll.AdapterConfig] = {
    "lora": ll.LoRAConfig(r=4, alpha=6, rslora=True),
    "lora_patterns": ll.LoRAConfig(r=4, alpha=6, rank_pattern={r"0\..*q_proj": 2}, alpha_pattern={"up_proj": 3.0}),
    "dora": ll.DoRAConfig(r=4, alpha=6),
    "ia3": ll.IA3Config(),
    "ia3_ff": ll.IA3FFConfig(target_names=("down_proj",)),
    "hra": ll.HRAConfig(r=4),
    "oft": ll.OFTConfig(block_size=8),
    "road_1": ll.RoAdConfig(mode=1, group_size=32),
    "road_2": ll.RoAdConfig(mode=2, group_size=16),
    "road_4": ll.RoAdConfig(mode=4, group_size=8),
    "delora": ll.DeLoRAConfig(r=4, frozen_copy=False),
}


@pytest.mark.parametrize("name", OURS)
def test_ours_are_opened_by_peft_and_come_back(name: str, tmp_path: Path) -> None:
    base = llama()
    model = copy.deepcopy(base)
    adapter = moved(model, OURS[name])
    expected = logits(model)
    assert not torch.allclose(expected, logits(base), atol=1e-3)
    ll.export_peft(model, tmp_path / "out")
    torch.testing.assert_close(opened_by_peft(base, tmp_path / "out"), expected, rtol=1e-4, atol=2e-5)
    again = copy.deepcopy(base)
    back = ll.import_peft(again, tmp_path / "out")
    assert back.record.variant is adapter.record.variant
    assert back.targets == adapter.targets
    assert all(
        back.layers()[path].cfg.to_dict().get("r") == adapter.layers()[path].cfg.to_dict().get("r")
        for path in back.targets
    )
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)


LINEAR = ["q_proj", "v_proj", "down_proj"]
THEIRS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR, init_lora_weights=False),
    "all": lambda: peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.1),
    "rslora": lambda: peft.LoraConfig(r=4, use_rslora=True, target_modules=r".*\.(q|k)_proj", init_lora_weights=False),
    "patterns": lambda: peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=LINEAR,
        init_lora_weights=False,
        use_rslora=True,
        rank_pattern={"q_proj": 2, r"layers\.1\..*down_proj": 3},
        alpha_pattern={"v_proj": 5},
    ),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=LINEAR, init_lora_weights=False),
    "dora_rslora": lambda: peft.LoraConfig(
        r=4, use_dora=True, use_rslora=True, target_modules=LINEAR, init_lora_weights=False
    ),
    "ia3": lambda: peft.IA3Config(target_modules=LINEAR, feedforward_modules=["down_proj"], init_ia3_weights=False),
    "hra": lambda: peft.HRAConfig(r=4, target_modules=LINEAR, init_weights=False),
    "oft": lambda: peft.OFTConfig(
        oft_block_size=8, target_modules=LINEAR, use_cayley_neumann=False, init_weights=False
    ),
    "oft_series": lambda: peft.OFTConfig(oft_block_size=8, target_modules=LINEAR, init_weights=False),
    "oft_blocks": lambda: peft.OFTConfig(
        r=4, oft_block_size=0, target_modules=LINEAR, use_cayley_neumann=False, init_weights=False
    ),
    "road": lambda: peft.RoadConfig(variant="road_4", group_size=32, target_modules=LINEAR, init_weights=False),
    "delora": lambda: peft.DeloraConfig(r=4, target_modules=LINEAR, rank_pattern={"q_proj": 2}, init_weights=False),
}


def saved_by_peft(base: Any, cfg: Any, folder: Path) -> torch.Tensor:
    """A peft adapter with values that do something; its logits."""
    torch.manual_seed(3)
    model = peft.get_peft_model(copy.deepcopy(base), cfg).eval()
    for key, p in model.named_parameters():
        if p.requires_grad:
            p.data.add_(0.03 * torch.randn_like(p)) if "ia3" not in key else p.data.copy_(1 + 0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    return logits(model)


@pytest.mark.parametrize("name", THEIRS)
def test_theirs_are_opened_here(name: str, tmp_path: Path) -> None:
    base = llama()
    expected = saved_by_peft(base, THEIRS[name](), tmp_path / "theirs")
    assert not torch.allclose(expected, logits(base), atol=1e-3)
    model = copy.deepcopy(base)
    ll.import_peft(model, tmp_path / "theirs", trainable=False)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=2e-5)
    assert not any(p.requires_grad for p in model.parameters())
    for one in ll.adapters(model):
        ll.save(model, tmp_path / f"{one}.safetensors", name=one)
    again = copy.deepcopy(base)
    for one in ll.adapters(model):
        ll.load(again, tmp_path / f"{one}.safetensors", name=one)
    assert torch.equal(logits(again), logits(model))


def test_both_kinds_of_ia3_become_two_adapters(tmp_path: Path) -> None:
    base = llama()
    saved_by_peft(base, THEIRS["ia3"](), tmp_path / "theirs")
    ll.import_peft(base, tmp_path / "theirs", name="gates")
    assert {name: adapter.record.variant.name for name, adapter in ll.adapters(base).items()} == {
        "gates": "ia3",
        "gates_ia3_ff": "ia3_ff",
    }


def test_conv1d(tmp_path: Path) -> None:
    base = gpt2()
    expected = saved_by_peft(
        base, peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True), tmp_path / "t"
    )
    model = copy.deepcopy(base)
    ll.import_peft(model, tmp_path / "t")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    ll.export_peft(model, tmp_path / "ours")
    torch.testing.assert_close(opened_by_peft(base, tmp_path / "ours"), expected, rtol=1e-4, atol=1e-5)


def test_pissa_of_peft_in_converted_form(tmp_path: Path) -> None:
    base = llama()
    torch.manual_seed(0)
    model = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=LINEAR, init_lora_weights="pissa")
    ).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.03 * torch.randn_like(p))
    expected = logits(model)
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours = copy.deepcopy(base)
    assert ll.import_peft(ours, tmp_path / "converted").cfg.r == 8
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4)


def edited(folder: Path, **fields: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"target_parameters": ["experts"]},
            r"target_parameters: experts is no parameter of this model",
        ),
        (
            {"peft_type": "XLORA"},
            r"no installed variant reads peft_type 'XLORA' with lora_A.weight, lora_B.weight \(.*q_proj\)\n  variants that read PEFT's files: adalora, adamss, alora, bitfit",
        ),
        ({"bias": "some"}, "bias='some' in adapter_config.json: it is 'none', 'all' or 'lora_only'"),
        (
            {"r": 5},
            r"its tensors are {'lora_A': \(4, 64\), 'lora_B': \(64, 4\)} for lora, which needs {'lora_A': \(5, 64\)",
        ),
    ],
)
def test_what_cannot_be_represented_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = llama()
    saved_by_peft(base, THEIRS["lora"](), tmp_path / "theirs")
    before = set(base.state_dict())
    with pytest.raises(ll.AdapterFileError, match=message):
        ll.import_peft(base, edited(tmp_path / "theirs", **fields))
    assert set(base.state_dict()) == before
    assert not ll.adapters(base)


def test_another_model_and_broken_folders(tmp_path: Path) -> None:
    base = llama()
    saved_by_peft(base, THEIRS["lora"](), tmp_path / "theirs")
    with pytest.raises(
        ll.AdapterFileError,
        match=r"down_proj.lora_A.weight belongs to no layer of this GPT2",
    ):
        ll.import_peft(gpt2(), tmp_path / "theirs")
    with pytest.raises(ll.AdapterFileError, match="for lora, which needs"):
        ll.import_peft(llama(hidden_size=32), tmp_path / "theirs")
    with pytest.raises(ll.AdapterFileError, match=r"holds no adapter_config.json: there is no such folder"):
        ll.import_peft(base, tmp_path / "nothing")
    (tmp_path / "theirs/adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(ll.AdapterFileError, match="adapter_model.safetensors is not a safetensors file"):
        ll.import_peft(base, tmp_path / "theirs")


@pytest.mark.parametrize("name", ["pissa", "lora_xs", "ssvd", "antipasto", "eva"])
def test_methods_that_peft_does_not_have(name: str, tmp_path: Path) -> None:
    model = llama()
    tokens = [torch.randint(0, 64, (3, 12))]
    ll.attach(model, config(name), calibration_data=tokens if name == "eva" else None)
    with pytest.raises(ll.MergeError, match=rf"variant '{name}' has no form of its own in PEFT; export_lora writes"):
        ll.export_peft(model, tmp_path / "out")


def test_forms_that_peft_does_not_have(tmp_path: Path) -> None:
    model = llama()
    ll.attach(model, ll.DeLoRAConfig(r=2))
    with pytest.raises(ll.MergeError, match="PEFT's DeLoRA has no frozen copies"):
        ll.export_peft(model, tmp_path / "out")
    ll.detach(model)
    ll.attach(model, ll.RoAdConfig())
    with pytest.raises(ll.MergeError, match="gate_proj has group_size=48, and PEFT has one for all modules"):
        ll.export_peft(model, tmp_path / "out")
    transposed = gpt2()
    ll.attach(transposed, ll.HRAConfig(r=2))
    with pytest.raises(ll.MergeError, match="PEFT's HRA takes nn.Linear layers, not a Conv1D"):
        ll.export_peft(transposed, tmp_path / "out")


@pytest.mark.parametrize("name", ["ia3", "dora", "road_1"])
def test_small_offsets_in_bfloat16_survive(name: str, tmp_path: Path) -> None:
    base = llama()
    model = copy.deepcopy(base)
    changes: dict[str, Any] = {**OURS[name].to_dict(), "dtype": "bfloat16"}
    adapter = ll.attach(model, ll.LoraLiteConfig(**changes))
    for p in adapter.parameters():
        if p.dim() == 1:
            p.data.fill_(0.0035)
    expected = logits(model)
    assert not torch.equal(expected, logits(base))
    ll.export_peft(model, tmp_path / "out")
    torch.testing.assert_close(opened_by_peft(base, tmp_path / "out"), expected, rtol=1e-4, atol=2e-5)
    with ll.merged(model):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=2e-5)


def test_patterns_of_whole_names(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict(
        {
            "proj": torch.nn.Linear(8, 8),
            "enc": torch.nn.ModuleDict({"proj": torch.nn.Linear(8, 8)}),
            "mid": torch.nn.Linear(8, 8),
        }
    )
    ll.attach(model, ll.LoRAConfig(r=2, alpha_pattern={"^proj": 8.0}))
    ll.export_peft(model, tmp_path / "out")
    ll.detach(model)
    back = ll.import_peft(model, tmp_path / "out")
    assert {path: target.cfg.alpha for path, target in back.layers().items()} == {
        "proj": 8.0,
        "enc.proj": 2,
        "mid": 2,
    }


def test_states_that_are_not_written(tmp_path: Path) -> None:
    model = llama()
    ll.attach(model, ll.IA3Config())
    model.model.layers[0].self_attn.q_proj.lora_g.data[0] = float("nan")
    with pytest.raises(ll.MergeError, match="lora_g of adapter 'default' on .* holds NaN or infinity"):
        ll.export_peft(model, tmp_path / "out")
    with torch.device("meta"):
        empty = torch.nn.Sequential(torch.nn.Linear(4, 4))
    ll.attach(empty, ll.IA3Config())
    with pytest.raises(ll.ModelStateError, match="adapter 'default' has no values yet"):
        ll.export_peft(empty, tmp_path / "out")
    shared = torch.nn.Linear(4, 4)
    twice = torch.nn.Sequential(shared, shared)
    ll.attach(twice, ll.IA3Config())
    with pytest.raises(ll.MergeError, match="1 is the same layer as 0, and PEFT would adapt one of the two alone"):
        ll.export_peft(twice, tmp_path / "out")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    ll.detach(model)
    ll.attach(model, ll.LoRAConfig(r=2))
    with pytest.raises(ll.AdapterFileError, match="file is a file; give a folder"):
        ll.export_lora(model, tmp_path / "file")
    assert not (tmp_path / "out").exists()


def test_missing_fields_and_tensors_are_named(tmp_path: Path) -> None:
    base = llama()
    saved_by_peft(base, THEIRS["lora"](), tmp_path / "theirs")
    path = tmp_path / "theirs/adapter_config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({key: value for key, value in fields.items() if key != "r"}), encoding="utf-8")
    with pytest.raises(
        ll.AdapterFileError, match="'r' is missing, in adapter_config.json or among its tensors lora_A.weight"
    ):
        ll.import_peft(base, tmp_path / "theirs")


def test_a_failed_second_half_takes_the_first_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_lite_core.files.peft import importing as exchange

    base = llama()
    saved_by_peft(base, THEIRS["ia3"](), tmp_path / "theirs")
    real, calls = exchange.install, iter([False, True])

    def install(*args: Any, **options: Any) -> None:
        if next(calls):
            raise RuntimeError("second")
        real(*args, **options)

    monkeypatch.setattr(exchange, "install", install)
    with pytest.raises(RuntimeError, match="second"):
        ll.import_peft(base, tmp_path / "theirs")
    assert not ll.adapters(base)
    assert all(p.requires_grad for p in base.parameters())
    assert "_lora_lite_adapters" not in vars(base)


BOTH_WAYS = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules=["first", "second", "third"], init_lora_weights=False),
    "dora": lambda: peft.LoraConfig(
        r=2, use_dora=True, target_modules=["first", "second", "third"], init_lora_weights=False
    ),
    "ia3": lambda: peft.IA3Config(
        target_modules=["first", "second", "third"], feedforward_modules=[], init_ia3_weights=False
    ),
    "ia3_ff": lambda: peft.IA3Config(
        target_modules=["first", "second", "third"],
        feedforward_modules=["first", "second", "third"],
        init_ia3_weights=False,
    ),
}


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_layers_stored_both_ways(name: str, tmp_path: Path) -> None:
    """Linear and Conv1D in one adapter: peft corrects fan_in_fan_out for each layer, here it is not needed."""
    base = Mixed()
    torch.manual_seed(3)
    theirs = peft.get_peft_model(copy.deepcopy(base), BOTH_WAYS[name]()).eval()
    for key, p in theirs.named_parameters():
        if p.requires_grad:
            p.data.copy_((1 if "ia3" in key else 0) + 0.2 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "theirs")
    expected = mixed_outputs(theirs)
    model = copy.deepcopy(base)
    ll.import_peft(model, tmp_path / "theirs")
    torch.testing.assert_close(mixed_outputs(model), expected, rtol=1e-4, atol=1e-5)
    ll.export_peft(model, tmp_path / "ours")
    checked_with_peft(base, tmp_path / "ours", expected)


def without(folder: Path, *parts: str) -> Path:
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(path).items() if not any(part in k for part in parts)}, path)
    return folder


@pytest.mark.parametrize("name", ["lora", "all", "rslora", "ia3", "oft"])
def test_a_folder_that_has_lost_a_module(name: str, tmp_path: Path) -> None:
    base = llama()
    saved_by_peft(base, THEIRS[name](), tmp_path / "theirs")
    lost = "layers.1.self_attn.q_proj"
    with pytest.raises(ll.AdapterFileError, match=rf"there is no tensor of model\.{lost}; the folder is not complete"):
        ll.import_peft(base, without(tmp_path / "theirs", lost), trainable=False)
    assert not ll.adapters(base)


def test_a_head_that_is_lost(tmp_path: Path) -> None:
    base = llama()
    saved_by_peft(base, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), tmp_path / "t")
    model = copy.deepcopy(base)
    adapter = ll.import_peft(model, tmp_path / "t")
    assert [key for key, _ in adapter.named_tensors()][-1] == "lm_head.weight"
    with pytest.raises(ll.AdapterFileError, match="modules_to_save: adapter_model.safetensors lacks lm_head.weight"):
        ll.import_peft(base, without(tmp_path / "t", "lm_head"))
    assert not ll.adapters(base)


def test_dropout(tmp_path: Path) -> None:
    """It is read where the method has it, and refused for training on where it has not."""
    base = llama()
    cfg = peft.LoraConfig(r=4, target_modules=LINEAR, init_lora_weights=False, lora_dropout=0.05)
    expected = saved_by_peft(base, cfg, tmp_path / "theirs")
    model = copy.deepcopy(base)
    adapter = ll.import_peft(model, tmp_path / "theirs")
    assert {target.cfg.dropout for target in adapter.layers().values()} == {0.05}
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=2e-5)
    oft = peft.OFTConfig(
        r=0, oft_block_size=8, target_modules=LINEAR, init_weights=False, module_dropout=0.1, use_cayley_neumann=False
    )
    expected = saved_by_peft(base, oft, tmp_path / "oft")
    with pytest.raises(
        ll.AdapterFileError,
        match=r"module_dropout=0.1 in adapter_config.json: variant 'oft' has no dropout; type import_peft\(…, trainable="
        r"False\) to run the adapter, which dropout does not change, or set it to 0 in adapter_config.json to train on wi",
    ):
        ll.import_peft(base, tmp_path / "oft")
    assert not ll.adapters(base)
    ll.import_peft(base, tmp_path / "oft", trainable=False)
    torch.testing.assert_close(logits(base), expected, rtol=1e-4, atol=2e-5)


def test_mica_is_run_and_not_trained(tmp_path: Path) -> None:
    base = llama()
    cfg = peft.LoraConfig(r=4, target_modules=LINEAR, init_lora_weights="mica")
    expected = saved_by_peft(base, cfg, tmp_path / "theirs")
    with pytest.raises(
        ll.AdapterFileError, match="init_lora_weights='mica' in adapter_config.json keeps lora_B as it is"
    ):
        ll.import_peft(base, tmp_path / "theirs")
    ll.import_peft(base, tmp_path / "theirs", trainable=False)
    torch.testing.assert_close(logits(base), expected, rtol=1e-4, atol=2e-5)


def test_delora_of_another_base(tmp_path: Path) -> None:
    """The file holds the norms of its base's columns, so that it can be told."""
    saved_by_peft(llama(), THEIRS["delora"](), tmp_path / "theirs")
    other = llama()
    other.model.layers[1].mlp.down_proj.weight.data.mul_(1.05)
    with pytest.raises(
        ll.AdapterFileError, match="down_proj: delora_w_norm does not hold the norms of this layer's col"
    ):
        ll.import_peft(other, tmp_path / "theirs")


@pytest.mark.parametrize("size", [(1, 6), (6, 1), (1, 1)])
def test_ia3_on_layers_that_are_one_wide(size: tuple[int, int], tmp_path: Path) -> None:
    """The shape of a gate does not tell its side there; the config does."""
    base = torch.nn.ModuleDict({"a": torch.nn.Linear(*size), "b": torch.nn.Linear(*size)})
    for feedforward in ([], ["a", "b"]):
        cfg = peft.IA3Config(target_modules=["a", "b"], feedforward_modules=feedforward, init_ia3_weights=False)
        theirs = peft.get_peft_model(copy.deepcopy(base), cfg).eval()
        theirs.save_pretrained(tmp_path / "theirs")
        model = copy.deepcopy(base)
        assert ll.import_peft(model, tmp_path / "theirs").record.variant.name == ("ia3_ff" if feedforward else "ia3")
        x = torch.randn(3, size[0])
        torch.testing.assert_close(model["a"](x), theirs.base_model.model["a"](x))
