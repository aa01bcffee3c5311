"""Which layers are chosen, and what wrong patterns, blocks, roles and layers get."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite_core.attached.targets.targeting import block_number, find_targets, role_of

from .models import HIDDEN, LINEAR_LAYERS, net, snapshot


def names(model: nn.Module, **fields: Any) -> list[str]:
    return [
        target.name for target in find_targets(model, ll.LoRAConfig(r=2, **fields), ll.get_variant("lora"), "default")
    ]


def refusal(error: type[ll.LoraLiteError], model: nn.Module, **fields: Any) -> str:
    before = snapshot(model)
    with pytest.raises(error) as caught:
        ll.attach(model, ll.LoRAConfig(r=2, **fields))
    assert snapshot(model) == before
    return str(caught.value)


def test_every_linear_layer_but_the_head_by_default() -> None:
    assert names(net()) == LINEAR_LAYERS


def test_patterns_search_the_full_name() -> None:
    assert names(net(), target_names=("q_proj",)) == ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]
    assert names(net(), target_names=(r"layers\.1\..*proj$",)) == LINEAR_LAYERS[5:]
    assert names(net(), target_names=("q_proj", "up_proj"), exclude_names=("layers.0",)) == [
        "layers.1.self_attn.q_proj",
        "layers.1.up_proj",
    ]


def test_blocks() -> None:
    assert names(net(blocks=3), layers=(0, 2), target_names="up_proj") == ["layers.0.up_proj", "layers.2.up_proj"]


def test_block_number_counts_the_outermost_list() -> None:
    model = nn.Module()
    model.h = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)])}) for _ in range(4))
    model.out = nn.Linear(2, 2)
    assert block_number(model, "h.3.experts.0") == 3
    assert block_number(model, "out") is None


def test_the_head_is_left_out_by_what_the_model_says() -> None:
    model = net()
    model.score = model.lm_head
    del model.lm_head
    model.get_output_embeddings = lambda: model.score  # type: ignore[method-assign]
    assert "score" not in names(model)
    assert "score" not in names(model, exclude_names=("o_proj",))
    assert "score" in names(model, exclude_names=())


def test_roles() -> None:
    model = net()
    assert names(model, target_roles=("writer",), layers=0) == ["layers.0.self_attn.o_proj", "layers.0.down_proj"]
    assert names(model, target_roles=("reader",), layers=0) == [
        "layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj", "layers.0.up_proj",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "d_in", "d_out", "role"),
    [
        ("a.q_proj", 8, 8, "reader"),
        ("attention.self.query", 8, 8, "reader"),
        ("SelfAttention.v", 8, 8, "reader"),
        ("attention.output.dense", 8, 8, "writer"),
        ("SelfAttention.o", 8, 8, "writer"),
        ("attn.c_proj", 8, 8, "writer"),
        ("mlp.fc1", 8, 32, "reader"),
        ("mlp.fc2", 32, 8, "writer"),
        ("experts.mid", 32, 32, "inner"),
        ("mix", 8, 8, "unknown"),
    ],
)
def test_role_of(name: str, d_in: int, d_out: int, role: str) -> None:
    assert role_of(name, d_in, d_out, hidden=8) == role


def test_misspelled_pattern() -> None:
    message = refusal(ll.TargetError, net(), target_names=("q_prj",))
    assert (
        message
        == (
            "target_names: 'q_prj' matches no layer; did you mean 'q_proj' or 'v_proj' or 'up_proj'?\n"
            "  linear layers here: q_proj, v_proj, o_proj, up_proj, down_proj"
        )
        or "did you mean 'q_proj'" in message
    )


def test_every_pattern_must_match() -> None:
    assert "target_names: 'k_proj' matches no layer" in refusal(
        ll.TargetError, net(), target_names=("q_proj", "k_proj")
    )


def test_pattern_that_matches_only_the_head() -> None:
    message = refusal(ll.TargetError, net(), target_names=("lm_head",))
    assert "target_names: 'lm_head' matches only excluded layers: lm_head" in message
    assert "to adapt them, give exclude_names=()" in message
    assert names(net(), target_names=("lm_head",), exclude_names=()) == ["lm_head"]


def test_pattern_that_matches_no_layer() -> None:
    model = net()
    model.norm = nn.LayerNorm(HIDDEN)
    message = refusal(ll.UnsupportedLayer, model, target_names=("norm",))
    assert "'norm' matches no linear layer, convolution, embedding or experts, only norm (LayerNorm)" in message


def test_an_embedding_is_a_target_where_it_is_named() -> None:
    assert "embed_tokens" not in names(net())
    assert "matches only excluded layers: embed_tokens" in refusal(
        ll.TargetError, net(), target_names=("embed_tokens",)
    )
    assert names(net(), target_names=("embed_tokens",), exclude_names=()) == ["embed_tokens"]


def test_exclude_pattern_that_matches_nothing() -> None:
    message = refusal(ll.TargetError, net(), exclude_names=("lm_head", "up_prj"))
    assert "exclude_names: 'up_prj' matches no module; did you mean 'up_proj'" in message


def test_everything_excluded() -> None:
    assert "no layer is left of 0 linear layers" in refusal(ll.TargetError, net(), exclude_names=("layers", "lm_head"))


def test_missing_block() -> None:
    message = refusal(ll.TargetError, net(), layers=(1, 7))
    assert message == "layers=[1, 7]: no target is in block 7; blocks here: 0, 1"


def test_role_that_nothing_has() -> None:
    assert (
        refusal(ll.TargetError, net(), target_roles=("inner",))
        == "target_roles: no target is a inner; roles here: reader, writer"
    )


def test_unknown_role_matters_only_with_roles() -> None:
    model = net()
    model.mix = nn.Linear(HIDDEN, HIDDEN)
    assert "mix" in names(model)
    message = refusal(ll.TargetError, model, target_roles=("reader",))
    assert "the role of mix cannot be told (16 → 16, and no known name)" in message
    assert "mix" not in names(model, target_roles=("reader",), exclude_names=("mix",))


def test_roles_need_a_hidden_size() -> None:
    model = net()
    del model.config
    assert "needs model.config.hidden_size, which Net has not" in refusal(
        ll.TargetError, model, target_roles=("reader",)
    )


def test_per_target_pattern_that_matches_nothing() -> None:
    message = refusal(ll.TargetError, net(), rank_pattern={"q_prj": 4})
    assert "rank_pattern or alpha_pattern: 'q_prj' matches no target; did you mean 'q_proj'" in message


def test_no_linear_layer_at_all() -> None:
    assert "Sequential has no linear layer" in refusal(ll.TargetError, nn.Sequential(nn.ReLU()))
    assert "the model is itself a Linear; wrap it" in refusal(ll.TargetError, nn.Linear(2, 2))


def test_attention_that_reads_its_weight_without_calling() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "mlp": nn.Linear(8, 8)})
    message = refusal(ll.UnsupportedLayer, model)
    assert "attention.out_proj belongs to an nn.MultiheadAttention" in message
    assert names(model, exclude_names=("out_proj",)) == ["mlp"]


def test_offloaded_layer() -> None:
    model = net()
    model.layers[0].up_proj._hf_hook = type("Hook", (), {"offload": True})()
    assert "the weight of layers.0.up_proj is offloaded by accelerate" in refusal(ll.UnsupportedLayer, model)


@pytest.mark.parametrize("kind", ["ConvTranspose1d", "Bilinear"])
def test_other_layers_are_not_linear(kind: str) -> None:
    layer = nn.ConvTranspose1d(4, 4, 1) if kind == "ConvTranspose1d" else nn.Bilinear(4, 4, 4)
    message = refusal(
        ll.UnsupportedLayer, nn.ModuleDict({"special": layer, "fc": nn.Linear(4, 4)}), target_names=("special",)
    )
    assert f"only special ({kind})" in message


def test_layer_that_returns_a_tuple_is_named_at_its_first_call() -> None:
    class Router(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x), None

    with torch.device("meta"):  # elsewhere `attach` tries it
        model = nn.Sequential(Router(4, 4))
    ll.attach(model, ll.LoRAConfig(r=2))
    model.to_empty(device="cpu")
    with pytest.raises(ll.UnsupportedLayer, match="a Router returned a tuple, not a tensor, and cannot carry adapters"):
        model(torch.zeros(1, 4))
