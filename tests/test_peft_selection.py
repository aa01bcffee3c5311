"""Which modules PEFT adapts by a config, and every field of its configs: compared with peft itself."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest

import lora_lite as ll
from lora_lite_core.files.peft.config_json.fields import IGNORED, KINDS, REFUSED, TRAINED
from lora_lite_core.files.peft.config_json.selection import Selection

from .test_export import gpt2, llama

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's and transformers' own

SELECTIONS: dict[str, dict[str, Any]] = {
    "names": {"target_modules": ["q_proj", "up_proj"]},
    "a name that is the end of no word": {
        "target_modules": ["q_proj", "1.mlp.down_proj", "model.layers.0.mlp.up_proj"]
    },
    "a pattern": {"target_modules": r".*\.layers\.1\.(self_attn|mlp)\.(q|k|up)_proj"},
    "a pattern of tools": {
        "target_modules": r"(?:.*?(?:language|text).*?(?:q_proj|k_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:q_proj|k_proj|v_proj)))"
    },
    "all": {"target_modules": "all-linear"},
    "ALL": {"target_modules": "All-Linear", "modules_to_save": ["1.mlp.up_proj"]},
    "without names": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["0.self_attn.q_proj", "up"]},
    "without a pattern": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.0\..*q_.*"},
    "a block": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "blocks": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 7]},
    "no blocks": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": []},
    "blocks of a list": {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    "blocks of lists": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [0],
        "layers_pattern": ["h", "model.layers"],
    },
    "a block and a full name": {"target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": [1]},
    "beside what is whole": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    "inside what is whole": {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["0.mlp"]},
    "whole in the middle of a word": {"target_modules": ["q_proj"], "modules_to_save": ["p_proj"]},
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_the_same_modules_as_peft(name: str) -> None:
    base = llama()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=1, **SELECTIONS[name]))
    selection = Selection(SELECTIONS[name], base)
    assert selection.adapted() == set(theirs.base_model.targeted_module_names)
    wrapped = [
        key.removeprefix("base_model.model.")
        for key, module in theirs.named_modules()
        if type(module).__name__ == "ModulesToSaveWrapper"
    ]
    assert selection.whole() == wrapped


@pytest.mark.parametrize("name", SELECTIONS)
def test_such_folders_are_opened(name: str, tmp_path: Path) -> None:
    base = llama()
    peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=1, **SELECTIONS[name])).save_pretrained(tmp_path)
    wanted = Selection(SELECTIONS[name], base).adapted()
    assert set(ll.import_peft(base, tmp_path).targets) == wanted


def test_the_same_ranks_as_peft() -> None:
    base = gpt2()
    tables = {
        "rank_pattern": {r"h\.1\..*": 3, "c_attn": 2, "^transformer.h.0.mlp.c_fc": 5},
        "alpha_pattern": {"c_fc": 9},
    }
    cfg = peft.LoraConfig(r=1, lora_alpha=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, **tables)
    theirs = peft.get_peft_model(copy.deepcopy(base), cfg)
    selection = Selection({"r": 1, "lora_alpha": 4, "target_modules": ["c_attn", "c_fc"], **tables}, base)
    for path in selection.adapted():
        layer = theirs.base_model.model.get_submodule(path)
        own = selection.own(path)
        assert (own["r"], own["lora_alpha"]) == (layer.r["default"], layer.lora_alpha["default"]), path


def test_a_layer_that_is_selected_twice() -> None:
    both = {"target_modules": ["q_proj"], "target_parameters": ["q_proj.weight"]}
    told = "target_modules and target_parameters both select model.layers.0.self_attn.q_proj, model.layers.1"
    with pytest.raises(ll.AdapterFileError, match=told):
        Selection(both, llama()).adapted()


CLASSES = ["LoraConfig", "IA3Config", "HRAConfig", "OFTConfig", "RoadConfig", "DeloraConfig"]
BY_THE_METHOD = {"eps", "num_cayley_neumann_terms"}  # read by OFT's from_peft, without a kind


@pytest.mark.parametrize("name", CLASSES)
def test_every_field_of_pefts_configs_is_known(name: str) -> None:
    """Read, ignored for a reason, or refused. A later peft may have more, which are refused where they are on."""
    known = {*IGNORED, *REFUSED, *TRAINED, *KINDS, *BY_THE_METHOD, "lora_dropout", "module_dropout"}
    fields = {field.name for field in dataclasses.fields(getattr(peft, name))}
    assert not fields - known or tuple(map(int, peft.__version__.split(".")[:2])) > (0, 21)
    assert not {*IGNORED} & {*REFUSED}
    assert not {*KINDS} & {*IGNORED, *REFUSED}


def test_every_field_is_in_the_documentation() -> None:
    page = (Path(__file__).parents[1] / "docs/from-peft.md").read_text(encoding="utf-8")
    known = {*IGNORED, *REFUSED, *TRAINED, *KINDS, *BY_THE_METHOD, "lora_dropout", "module_dropout"}
    assert not [field for field in sorted(known) if f"`{field}`" not in page]
