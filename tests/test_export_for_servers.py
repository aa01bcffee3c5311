"""What a server needs beside the factors: the names of the class that is served, a prompt that proves it, the losses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lora_lite as ll
from lora_lite_core.files.peft.serving import check_prompt, verifying

from .test_export import llama, moved

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's and transformers' own


def lively(**changes: Any) -> Any:
    return llama(initializer_range=0.2, **changes)


def base_in(folder: Path, model: Any) -> str:
    model.save_pretrained(folder)
    return str(folder)


def keys(folder: Path) -> set[str]:
    return {key.removeprefix("base_model.model.") for key in load_file(folder / "adapter_model.safetensors")}


def test_names_of_the_served_class(tmp_path: Path) -> None:
    """Attached to the body alone, served with a head: the body's names lack a prefix that servers want."""
    model = lively().model
    moved(model, ll.HRAConfig(r=4, target_names=("q_proj", "down_proj")), size=0.3)
    done = ll.export_lora(model, tmp_path / "out", served="LlamaForCausalLM")
    assert done.renamed["layers.0.self_attn.q_proj"] == "model.layers.0.self_attn.q_proj"
    assert all(key.startswith("model.layers.") for key in keys(tmp_path / "out"))
    from peft import PeftModel

    ids = torch.arange(12).view(2, 6)
    served = PeftModel.from_pretrained(lively(), tmp_path / "out").eval()
    torch.testing.assert_close(served.base_model.model.model(ids)[0], model(ids)[0], rtol=1e-4, atol=1e-4)
    assert "model.layers.1.mlp.down_proj" in str(done)
    assert ll.export_lora(model, tmp_path / "same").renamed == {}


def test_prefixes_in_another_order_and_the_other_way_round(tmp_path: Path) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(8, 8)}) for _ in range(2))

    def nested(*names: str) -> nn.Module:
        model: nn.Module = Inner()
        for name in reversed(names):
            model = nn.ModuleDict({name: model})
        return model

    model = nested("model", "language_model")
    moved(model, ll.LoRAConfig(r=2, target_names=("fc",)))
    for names in (("language_model", "model"), ("model",), (), ("a", "language_model", "model")):
        path = ".".join((*names, "layers.1.fc"))
        done = ll.export_lora(model, tmp_path / "out", served=nested(*names))
        assert done.renamed["model.language_model.layers.1.fc"] == path
        assert f"{path}.lora_A.weight" in keys(tmp_path / "out")


class Two(nn.Module):
    """Two towers with layers of the same names and sizes."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(8, 8)})])}))


@pytest.mark.parametrize(
    ("own", "served"),
    [
        (("vision",), ("text",)),  # another tower
        (("vision", "text"), ()),  # neither
        (("text",), ("text_a", "text_b")),  # which of two?
    ],
)
def test_another_layer_of_that_name_is_not_taken(own: Sequence[str], served: Sequence[str], tmp_path: Path) -> None:
    model = Two(*own)
    moved(model, ll.LoRAConfig(r=2, target_names=("fc",)))
    with pytest.raises(ll.MergeError, match=r"the served Two has no single layer that is \w+\.layers\.0\.fc \(8 × 8\)"):
        ll.export_lora(model, tmp_path / "out", served=Two(*served))
    assert not (tmp_path / "out").exists()


def test_layers_that_the_served_class_lacks(tmp_path: Path) -> None:
    model = lively()
    moved(model, ll.LoRAConfig(r=2, target_names=("q_proj", "lm_head"), exclude_names=()))
    with pytest.raises(ll.MergeError) as caught:
        ll.export_lora(model, tmp_path / "out", served="LlamaModel")
    assert str(caught.value) == (
        "the served LlamaModel has no single layer that is lm_head (64 × 64)\n  called 'lm_head' there: none\n"
        "  a server would load the adapter and leave this layer out; attach to the class that is served"
    )


@pytest.mark.parametrize(
    ("served", "text"),
    [
        ("LlamaForCausalML", r"transformers has no such class; did you mean 'LlamaForCausalLM'\?$"),
        (int, r"served=<class 'int'>: give a model's class, the name of one of transformers', or a model"),
        ("GPT2LMHeadModel", r"is made from a GPT2Config, and this LlamaForCausalLM has a LlamaConfig; give the class"),
        (Two, r"served=Two cannot be made from this model's config: TypeError"),
    ],
)
def test_classes_that_cannot_be_served(served: Any, text: str, tmp_path: Path) -> None:
    model = lively()
    moved(model, ll.LoRAConfig(r=2))
    with pytest.raises(ll.ConfigError, match=text):
        ll.export_lora(model, tmp_path / "out", served=served)
    assert not (tmp_path / "out").exists()


def test_a_check_prompt_is_verified_by_peft(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", lively())
    model = lively()
    moved(model, ll.PiSSAConfig(r=4), size=0.3)
    model.train()
    done = ll.export_lora(model, tmp_path / "out", check=True)
    assert model.training
    assert done.check is not None
    assert done.check.tells
    greedy = model.eval().generate(torch.tensor([done.check.prompt]), max_new_tokens=16, do_sample=False)
    assert greedy[0, 8:].tolist()[: len(done.check.tokens)] == done.check.tokens
    assert json.loads((tmp_path / "out/lora_lite_export.json").read_text())["check"]["tokens"] == done.check.tokens
    assert ll.verify_export(tmp_path / "out", base) == done.check


def test_an_engine_that_leaves_the_adapter_out_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively()
    moved(model, ll.LoRAConfig(r=4), size=0.3)
    check = ll.export_lora(model, tmp_path / "out", check=[5, 6, 7]).check
    assert check is not None
    for found, words in (
        (check.base_tokens, "has had no effect"),
        ([0, 1, 2], f"the adapter gives [{check.tokens[0]}"),
    ):
        monkeypatch.setattr(verifying, "with_peft", lambda *_, found=found: found[: len(check.tokens)])
        with pytest.raises(ll.MergeError) as caught:
            ll.verify_export(tmp_path / "out", "base")
        assert str(caught.value).startswith("peft generates [")
        assert words in str(caught.value)


def test_a_prompt_that_proves_nothing_is_said_to(tmp_path: Path) -> None:
    model = lively()
    ll.attach(model, ll.LoRAConfig(r=4))
    done = ll.export_lora(model, tmp_path / "out", check=True)
    assert "the base alone generates the same: it proves nothing" in str(done)
    with pytest.raises(ll.AdapterFileError, match=r"proves nothing: the base alone generates the same .*; export with"):
        ll.verify_export(tmp_path / "out", "base")


@pytest.mark.parametrize("ids", [[], [64], [-1], [True], ["a"], [1.0]])
def test_what_is_no_prompt(ids: Any, tmp_path: Path) -> None:
    model = lively()
    moved(model, ll.LoRAConfig(r=2))
    with pytest.raises(ll.ConfigError, match=r"a prompt is a list of token ids, whole numbers from 0 to 63"):
        ll.export_lora(model, tmp_path / "out", check=ids)
    assert not (tmp_path / "out").exists()


def test_models_without_logits_have_no_prompt(tmp_path: Path) -> None:
    body, plain = lively().model, nn.Sequential(nn.Linear(4, 4))
    for model, text in ((body, r"this LlamaModel gives no logits for input_ids"), (plain, r"has no config.vocab_size")):
        moved(model, ll.LoRAConfig(r=2))
        with pytest.raises(ll.ModelStateError, match=text):
            ll.export_lora(model, tmp_path / "out", check=[1, 2])


def test_close_choices_are_no_part_of_a_check() -> None:
    class Close(nn.Module):
        """The second choice is nearly a tie."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, input_ids: torch.Tensor) -> Any:
            logits = torch.zeros(1, 1, 9)
            logits[..., 3], logits[..., 4] = 1.0, 0.999 if input_ids.shape[1] == 3 else 0.0
            return type("Output", (), {"logits": logits})

    assert check_prompt.greedy(Close(), [1, 2], 5) == ([3, 3, 3, 3, 3], 1)


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", "{", '{"check": 3}', '{"check": {"prompt": [1], "tokens": ["\\u001b[31m"], "base_tokens": []}}'],
)
def test_a_strangers_check(text: str, tmp_path: Path) -> None:
    (tmp_path / "lora_lite_export.json").write_text(text, encoding="utf-8")
    with pytest.raises(ll.AdapterFileError, match=r"cannot be read: |holds no check prompt") as caught:
        ll.verify_export(tmp_path, "base")
    assert "\x1b" not in str(caught.value)


def test_engines_are_packages(tmp_path: Path, site: Path) -> None:
    model = lively()
    moved(model, ll.LoRAConfig(r=4), size=0.3)
    check = ll.export_lora(model, tmp_path / "out", check=True).check
    assert check is not None
    folder = site / "lora_lite_mine-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: lora-lite-mine\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[lora_lite.engines]\nmine = lora_lite_mine:generate\n")
    (site / "lora_lite_mine.py").write_text(
        f"def generate(base, folder, prompt, count):\n    assert base == 'there'\n    return {check.tokens}[:count]\n"
    )
    assert ll.verify_export(tmp_path / "out", "there", engine="mine") == check
    with pytest.raises(ll.MissingPlugin, match=r"no engine is called 'mien'; did you mean 'mine'\?\n  engines: mine, "):
        ll.verify_export(tmp_path / "out", "there", engine="mien")
