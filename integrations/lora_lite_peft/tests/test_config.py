"""LoraLiteConfig: what it takes, and what it says of what it does not."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from lora_lite_peft import LoraLiteConfig
from peft import PeftConfig, get_peft_config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import lora_lite as ll


def test_what_it_takes() -> None:
    typed = LoraLiteConfig(ll.HRAConfig(r=4), task_type="CAUSAL_LM")
    named = LoraLiteConfig(variant="hra", r=4, task_type="CAUSAL_LM")
    assert isinstance(named, PeftConfig)
    assert typed == named
    assert named != LoraLiteConfig(variant="hra", r=6, task_type="CAUSAL_LM")
    assert named.cfg == ll.HRAConfig(r=4)
    assert "variant='hra'" in repr(named)
    assert LoraLiteConfig(variant="lora", modules_to_save=("score",)).trained_modules == ["score"]


def test_round_trips(tmp_path: Any) -> None:
    config = LoraLiteConfig(
        variant="lora",
        r=4,
        rank_pattern={"q_proj": 2},
        layers=(0,),
        seed=7,
        modules_to_save=["score"],
        task_type="SEQ_CLS",
    )
    config.save_pretrained(str(tmp_path))
    for other in (
        PeftConfig.from_pretrained(str(tmp_path)),
        LoraLiteConfig.from_pretrained(str(tmp_path)),
        get_peft_config(config.to_dict()),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ):
        assert other == config
        assert other.cfg == config.cfg
    assert PEFT_TYPE_TO_CONFIG_MAPPING["LORA_LITE"] is LoraLiteConfig


WRONG = {
    "no variant": (lambda: LoraLiteConfig(), ll.ConfigError, "LoraLiteConfig needs a variant, as in variant='lora'\n  installed: adalora, adamss, alora, "),
    "no such variant": (lambda: LoraLiteConfig(variant="pisa"), ll.UnknownVariant, "no variant is called 'pisa'; did you mean 'pissa'?\n  installed: "),
    "no such field": (lambda: LoraLiteConfig(variant="hra", ranc=8), ll.ConfigError, "HRAConfig has no field 'ranc'"),
    "PEFT's name of a field": (lambda: LoraLiteConfig(variant="lora", lora_alpha=8), ll.ConfigError, "LoRAConfig has no field 'lora_alpha'; did you mean 'alpha'?\n  fields: "),
    "PEFT's target_modules": (lambda: LoraLiteConfig(variant="hra", target_modules=["q"]), ll.ConfigError, "HRAConfig has no field 'target_modules'; did you mean 'target_names'?"),
    "a field of ours, misspelled": (lambda: LoraLiteConfig(variant="hra", task_typ="CAUSAL_LM"), ll.ConfigError, "LoraLiteConfig has no field 'task_typ'; did you mean 'task_type'?\n  fields of all variants: variant, modules_to_save, seed"),
    "a value": (lambda: LoraLiteConfig(variant="hra", r=0), ll.ConfigError, "HRAConfig(r=0): a rank is a whole number of at least 1"),
    "a task": (lambda: LoraLiteConfig(variant="hra", task_type="CHESS"), ValueError, "Invalid task type: 'CHESS'"),
    "modules_to_save": (lambda: LoraLiteConfig(variant="hra", modules_to_save="score"), ll.ConfigError, "LoraLiteConfig(modules_to_save='score'): give names in a list, as in ['score']"),
    "two configs": (lambda: LoraLiteConfig(ll.HRAConfig(), variant="hra", r=8), ll.ConfigError, "LoraLiteConfig was given HRAConfig and variant, r; give a variant's config alone"),
    "no config": (lambda: LoraLiteConfig("hra"), ll.ConfigError, "LoraLiteConfig was given a str; give a variant's config alone, as LoraLiteConfig(HRAConfig(r=8)), or names, as LoraLiteConfig(variant='hra', r=8)"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name: str) -> None:
    call, error, message = WRONG[name]
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)


def test_what_a_caller_of_pefts_own_looks_for() -> None:
    config = LoraLiteConfig(variant="lora", r=4)
    assert "lm_head" not in config.modules_to_save
    config.modules_to_save.append("lm_head")
    config.modules_to_save.extend(["classifier", "score"])  # as PEFT does by task
    assert "lm_head" in config.modules_to_save
    assert config.to_dict()["modules_to_save"] == ["lm_head"]
    for name, hint in (
        ("r", "LoraLiteConfig has no 'r'; it is config['r'] here"),
        ("trainable_token_indices", "; train embedding and head whole: modules_to_save=['embed_tokens', 'lm_head']"),
        ("lora_bias", "LoraLiteConfig has no 'lora_bias'"),
    ):
        with pytest.raises(AttributeError) as caught:
            getattr(config, name)
        assert str(caught.value).endswith(hint)
