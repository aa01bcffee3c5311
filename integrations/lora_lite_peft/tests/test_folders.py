"""The folder that save_pretrained writes, and what is said of one that does not fit."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_lite_peft import LoraLiteConfig
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora_lite as ll

FILE = "adapter_model.safetensors"
PISSA = {"variant": "pissa", "r": 2, "target_names": ("q_proj", "v_proj")}


@pytest.fixture
def folder(llama: Any, ids: Any, train: Any, tmp_path: Path) -> Path:
    """A trained PiSSA adapter of llama(), which fits no other base."""
    model = get_peft_model(llama(), LoraLiteConfig(**PISSA, task_type="CAUSAL_LM"))
    train(model, ids)
    model.save_pretrained(tmp_path / "pissa")
    return tmp_path / "pissa"


def test_the_file_is_a_lora_lite_file(folder: Path) -> None:
    file = ll.inspect(folder / FILE)
    assert (file.variant, len(file.targets), len(file.tensors)) == ("pissa", 4, 16)
    assert all(target["fingerprint"] for target in file.targets.values())
    again = folder.parent / "again"
    model = PeftModel.from_pretrained(_base(), folder)
    model.save_pretrained(again)
    model.save_pretrained(again)  # over what is there
    assert (again / FILE).read_bytes() == (folder / FILE).read_bytes()


def _base(seed: int = 0) -> Any:
    """The model of the fixture `llama`, for functions that are called in a table."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    ).eval()  # fmt: skip


def rewritten(folder: Path, edit: Any, **changes: Any) -> None:
    with safe_open(folder / FILE, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / FILE)
    edit(tensors, metadata)
    save_file(tensors, folder / FILE, metadata=metadata | changes)


def pruned(tensors: dict[str, torch.Tensor], _: Any) -> None:
    del tensors["model.layers.0.self_attn.q_proj.lora_dA"]


def renamed(_: Any, metadata: dict[str, str]) -> None:
    metadata["adapter"] = metadata["adapter"].replace('"r": 2', '"r": 3')


def unknown_plugin(folder: Path) -> None:
    header = json.loads((folder / "adapter_config.json").read_text())
    header["config"]["variant"] = "nobody"
    (folder / "adapter_config.json").write_text(json.dumps(header))

    def edit(tensors: Any, metadata: Any) -> None:
        for old, new in (('"variant": "pissa"', '"variant": "nobody"'), ("lora-lite-svd", "lora-lite-nobody")):
            metadata["adapter"] = metadata["adapter"].replace(old, new)
        tensors["lora_lite.header"] = torch.tensor(list(metadata["adapter"].encode()), dtype=torch.uint8)

    rewritten(folder, edit)


WRONG = {
    "another base": (lambda f: PeftModel.from_pretrained(_base(1), f), ll.BaseMismatch, "was made on another base model: model.layers."),
    "another architecture": (lambda f: PeftModel.from_pretrained(torch.nn.Sequential(torch.nn.Linear(2, 2)), f), ll.AdapterFileError, "4 of 4 targets are not in this Sequential"),
    "a tensor taken out": (lambda f: (rewritten(f, pruned), PeftModel.from_pretrained(_base(), f)), ll.AdapterFileError, "missing: model.layers.0.self_attn.q_proj.lora_dA"),
    "an edited header": (lambda f: (rewritten(f, renamed), PeftModel.from_pretrained(_base(), f)), ll.AdapterFileError, "has shape (2, 32), this model needs (3, 32)"),
    "a file cut short": (lambda f: ((f / FILE).write_bytes((f / FILE).read_bytes()[:-8]), PeftModel.from_pretrained(_base(), f)), ll.AdapterFileError, "is cut short or damaged"),
    "a missing plugin": (lambda f: (unknown_plugin(f), PeftModel.from_pretrained(_base(), f)), ll.MissingPlugin, "needs variant 'nobody' of lora-lite-nobody 0.1.0; type: pip install lora-lite-nobody"),
    "a pickle": (lambda f: get_peft_model(_base(), LoraLiteConfig(**PISSA)).save_pretrained(f.parent / "bin", safe_serialization=False), ll.AdapterFileError, "adapters are saved as adapter_model.safetensors, not as adapter_model.bin; leave safe_serialization=False out"),
    "PEFT's own adapter": (lambda f: (get_peft_model(_base(), LoraConfig(target_modules=["q_proj"])).save_pretrained(f), LoraLiteConfig.from_pretrained(f)), ll.ConfigError, "holds an adapter of PEFT's method LORA, not of lora-lite"),
    "over PEFT's own adapter": (lambda f: (get_peft_model(_base(), LoraConfig(target_modules=["q_proj"])).save_pretrained(f), LoraLiteConfig(**PISSA).save_pretrained(f)), ll.AdapterFileError, "was not written of a lora-lite adapter; give another folder"),
    "converted": (lambda f: PeftModel.from_pretrained(_base(), f).save_pretrained(f, path_initial_model_for_weight_conversion=f.parent / "x"), ValueError, "`path_initial_model_for_weight_conversion` to `save_pretrained` is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name: str, folder: Path) -> None:
    call, error, message = WRONG[name]
    with pytest.raises(error) as caught:
        call(folder)
    assert message in str(caught.value)


def test_another_base_with_a_warning(folder: Path, ids: Any) -> None:
    with pytest.warns(UserWarning, match="was made on another base model"):
        model = PeftModel.from_pretrained(_base(1), folder, on_base_mismatch="warn")
    assert list(ll.adapters(model.get_base_model())) == ["default"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(_base(1), folder, on_base_mismatch="ignore")


OTHER = {
    "another variant": ({"variant": "lora", "r": 2}, ll.AdapterFileError, "the checkpoint holds variant 'pissa', and adapter 'default' is a 'lora'"),
    "another alpha": ({**PISSA, "alpha": 8.0}, ll.AdapterFileError, "the checkpoint was trained with alpha=None, and adapter 'default' has alpha=8.0 (on model.layers.0.self_attn.q_proj)"),
    "another rank": ({**PISSA, "r": 3}, ll.AdapterFileError, "trained with r=2, and adapter 'default' has r=3"),
    "other layers": ({**PISSA, "target_names": ("q_proj",)}, ll.AdapterFileError, "the checkpoint is on other layers than adapter 'default'; attach what the checkpoint was trained with, or begin in another folder\n  only in the checkpoint: model.layers.0.self_attn.v_proj"),
    "modules trained whole": ({**PISSA, "modules_to_save": ["norm"]}, ll.AdapterFileError, "missing: model.norm.weight"),
    "the same layers, otherwise chosen": ({**PISSA, "target_names": ("(q|v)_proj",)}, None, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_a_checkpoint_into_an_adapter_that_is_there(name: str, folder: Path, ids: Any, train: Any) -> None:
    fields, error, message = OTHER[name]
    model = get_peft_model(_base(), LoraLiteConfig(**fields))
    train(model, ids, 1)
    before = model(ids).logits
    if error is None:
        model.load_adapter(folder, "default")
        assert torch.equal(model(ids).logits, PeftModel.from_pretrained(_base(), folder)(ids).logits)
        return
    with pytest.raises(error) as caught:
        model.load_adapter(folder, "default")
    assert message in str(caught.value)
    assert torch.equal(model(ids).logits, before)


def test_a_checkpoint_on_another_base(folder: Path, ids: Any) -> None:
    model = get_peft_model(_base(1), LoraLiteConfig(**PISSA))
    before = model(ids).logits
    with pytest.raises(ll.BaseMismatch, match="the checkpoint was made on another base model"):
        model.load_adapter(folder, "default")
    assert torch.equal(model(ids).logits, before)


def test_tensors_in_memory(folder: Path, ids: Any) -> None:
    one, other = PeftModel.from_pretrained(_base(), folder), get_peft_model(_base(), LoraLiteConfig(**PISSA))
    state = get_peft_model_state_dict(one)
    set_peft_model_state_dict(other, state)
    assert torch.equal(one(ids).logits, other(ids).logits)
    with pytest.raises(ll.AdapterFileError, match="these tensors are no lora-lite adapter that PEFT has saved"):
        set_peft_model_state_dict(other, {"a": torch.zeros(1)})
    given = {name: value * 2 if "lora_dA" in name else value for name, value in one.state_dict().items()}
    doubled = get_peft_model_state_dict(one, state_dict=given)
    key = "model.layers.1.self_attn.v_proj.lora_dA"
    assert torch.equal(doubled[key], state[key] * 2)


def test_a_part_of_a_tensor_is_not_saved(folder: Path) -> None:
    """As FSDP1 and ZeRO-3 leave them in the place of the whole ones."""
    model = PeftModel.from_pretrained(_base(), folder)
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.lora_dA = torch.nn.Parameter(torch.empty(0))
    with pytest.raises(ll.ModelStateError, match=r"q_proj.lora_dA is sharded; give the gathered values"):
        model.save_pretrained(folder.parent / "part")
    model.save_pretrained(folder.parent / "gathered", state_dict=whole)
    assert (folder.parent / "gathered" / FILE).read_bytes() == (folder / FILE).read_bytes()


def test_saving_while_switched_off(folder: Path) -> None:
    model = PeftModel.from_pretrained(_base(), folder)
    with model.disable_adapter():
        model.save_pretrained(folder.parent / "off")
    assert (folder.parent / "off" / FILE).read_bytes() == (folder / FILE).read_bytes()


def test_from_the_cache_of_the_hub(folder: Path, ids: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = folder.parent / "cache" / "models--ada--pissa"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("0" * 40)
    shutil.copytree(folder, cache / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    expected = PeftModel.from_pretrained(_base(), folder)(ids).logits
    for place, where in (("ada/pissa", {"cache_dir": cache.parent}), (str(folder.parent), {"subfolder": "pissa"})):
        assert torch.equal(PeftModel.from_pretrained(_base(), place, **where)(ids).logits, expected)
    with pytest.raises(ll.BaseMismatch):
        PeftModel.from_pretrained(_base(1), "ada/pissa", cache_dir=cache.parent)


def test_an_embedding_of_another_size(tmp_path: Path, ids: Any) -> None:
    _base().save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(110)
    model = get_peft_model(base, LoraLiteConfig(variant="lora", r=2))
    ours = pytest.warns(UserWarning, match="PEFT saves embeddings that have another size than the base's, a lora-lite")
    with ours, pytest.warns(UserWarning, match="Setting `save_embedding_layers` to `True`"):
        model.save_pretrained(tmp_path / "adapter")
    assert not [key for key in ll.inspect(tmp_path / "adapter" / FILE).tensors if "embed" in key]
