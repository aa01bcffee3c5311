"""Configs: unknown fields, bad values, JSON both ways, per-target fields."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import lora_lite as ll

from .usual import NEEDED

CONFIGS = [
    ll.LoRAConfig(r=4, alpha=8, rslora=True, target_names=("q_proj",), layers=(0, 1), dtype="bfloat16"),
    ll.PiSSAConfig(r=3, rank_pattern={"q_proj": 5}, alpha_pattern={"v_proj": 2.0}),
    ll.IA3Config(target_roles=("reader",)),
    ll.IA3FFConfig(exclude_names=()),
]


@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda cfg: cfg.variant)
def test_json_round_trip(cfg: ll.AdapterConfig) -> None:
    assert ll.LoraLiteConfig(**json.loads(json.dumps(cfg.to_dict()))) == cfg


def test_by_name_is_the_typed_config() -> None:
    assert type(ll.LoraLiteConfig(variant="pissa", r=2)) is ll.PiSSAConfig


def test_a_string_is_one_pattern_and_a_number_one_block() -> None:
    cfg = ll.LoRAConfig(target_names="q_proj", layers=1)
    assert cfg.target_names == ("q_proj",)
    assert cfg.layers == (1,)


def test_dtype_may_be_a_torch_dtype() -> None:
    assert ll.LoRAConfig(dtype=torch.bfloat16).dtype == "bfloat16"


def test_scale() -> None:
    assert ll.LoRAConfig(r=4).scale == 1.0
    assert ll.LoRAConfig(r=4, alpha=8).scale == 2.0
    assert ll.LoRAConfig(r=4, alpha=8, rslora=True).scale == 4.0
    assert ll.LoRAConfig(r=4, rslora=True).scale == 2.0


def test_first_matching_pattern_wins() -> None:
    cfg = ll.LoRAConfig(r=8, rank_pattern={"layers.0.*q_proj": 2, "q_proj": 4}, alpha_pattern={"v_proj": 16})
    assert [cfg.for_target(name).r for name in ("layers.0.q_proj", "layers.1.q_proj", "layers.0.v_proj")] == [2, 4, 8]
    assert cfg.for_target("layers.0.v_proj").alpha == 16
    assert cfg.for_target("layers.0.o_proj") is cfg


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ll.LoRAConfig(rank=4), "LoRAConfig has no field 'rank'; did you mean 'r'?\n  fields: dtype"),
        (lambda: ll.LoRAConfig(target_modules=["q"]), "has no field 'target_modules'; did you mean 'target_names'?"),
        (lambda: ll.LoRAConfig(modules_to_save=["score"]), "has no field 'modules_to_save'; did you mean 'train_modules'?"),
        (lambda: ll.IA3Config(rank=4), "IA3Config has no field 'rank'\n  fields: dtype"),
        (lambda: ll.LoRAConfig(target_name="q"), "LoRAConfig has no field 'target_name'; did you mean 'target_names'?\n  fields: dtype"),
        (lambda: ll.IA3Config(alpha=2), "IA3Config has no field 'alpha'"),
        (lambda: ll.LoRAConfig(8), "LoRAConfig takes keyword arguments only, as in LoRAConfig(r=…)"),
        (lambda: ll.LoRAConfig(r=0), "LoRAConfig(r=0): a rank is a whole number of at least 1"),
        (lambda: ll.LoRAConfig(r="8"), "LoRAConfig(r='8'): a rank is a whole number"),
        (lambda: ll.LoRAConfig(r=True), "LoRAConfig(r=True): a rank is a whole number"),
        (lambda: ll.LoRAConfig(alpha=-1), "LoRAConfig(alpha=-1): alpha is a number above 0"),
        (lambda: ll.LoRAConfig(rank_pattern={"q": 0}), "LoRAConfig(rank_pattern={'q': 0}): a rank"),
        (lambda: ll.LoRAConfig(alpha_pattern={"q": "x"}), "LoRAConfig(alpha_pattern={'q': 'x'}): alpha is a number"),
        (lambda: ll.LoRAConfig(rank_pattern=["q"]), "LoRAConfig(rank_pattern=['q']): give a dict"),
        (lambda: ll.LoRAConfig(target_names=("q(",)), "LoRAConfig: 'q(' is not a regular expression"),
        (lambda: ll.LoRAConfig(target_names=3), "LoRAConfig(target_names=3): give strings"),
        (lambda: ll.LoRAConfig(dtype="float23"), "LoRAConfig(dtype='float23') is not a dtype for adapter tensors; did you mean 'float32'?"),
        (lambda: ll.LoRAConfig(dtype=torch.int8), "is not a dtype for adapter tensors"),
        (lambda: ll.LoRAConfig(target_roles=("writter",)), "no role is called 'writter'; did you mean 'writer'?\n  roles: reader"),
        (lambda: ll.LoRAConfig(layers=(-1,)), "LoRAConfig(layers=(-1,)): give block numbers from 0"),
        (lambda: ll.LoRAConfig(layers=()), "give block numbers from 0, or None for all"),
        (lambda: ll.LoraLiteConfig(variant="lora", rr=1), "LoRAConfig has no field 'rr'"),
        (lambda: ll.LoRAConfig(alpha=float("inf")), "LoRAConfig(alpha=inf): alpha is a number above 0"),
        (lambda: ll.LoRAConfig(rslora="no"), "LoRAConfig(rslora='no'): rslora is True or False"),
        (lambda: ll.LoRAConfig(init=["gaussian"]), "LoRAConfig(init=['gaussian']): init is a string"),
        (lambda: ll.EVAConfig(rho="2"), "EVAConfig(rho='2'): rho is a finite number"),
        (lambda: ll.DyLoRAConfig(min_r=None), "DyLoRAConfig(min_r=None): min_r is a whole number"),
        (lambda: ll.DyLoRAConfig(use_r=1.5), "DyLoRAConfig(use_r=1.5): use_r is a whole number, or None"),
    ],
)  # fmt: skip
def test_bad_values(make: object, message: str) -> None:
    with pytest.raises(ll.ConfigError) as caught:
        make()
    assert message in str(caught.value)


REFUSED = {
    "bool": ["no", None, 0, 1, 0.5, []],
    "int": ["1", None, True, 1.0, 1.5, float("nan"), [1], {}],
    "float": ["0.5", None, True, float("nan"), float("inf"), -float("inf"), [0.5], 1j],
    "str": [None, 1, True, ["svd"], {}],
}


@pytest.mark.parametrize("name", [info.name for info in ll.list_variants()])
def test_no_variant_takes_what_its_field_is_not(name: str) -> None:
    """Each field that holds one value, with all kinds of others: refused, by a typed error that names field and value."""
    Config, needed = ll.get_variant(name).Config, {**NEEDED, "trainable_tokens": {"rows": (1,)}}.get(name, {})
    for field in dataclasses.fields(Config):
        kind, _, optional = str(field.type).partition(" | ")
        for value in REFUSED.get(kind, ()):
            if optional in ("", "None") and not (optional and value is None):
                with pytest.raises(ll.ConfigError) as caught:
                    Config(**{**needed, field.name: value})
                assert f"{Config.__name__}({field.name}={value!r}" in str(caught.value)


def test_whole_numbers_are_numbers() -> None:
    assert ll.EVAConfig(rho=2).rho == 2
    assert ll.LoRAGAConfig(gamma=4, alpha=8, dropout=0).gamma == 4
