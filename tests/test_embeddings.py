"""Embeddings as linear layers on token ids: every variant that can, against the table with the merged weight."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import lora_lite as ll

from .usual import SPREAD

SMALL: dict[str, dict[str, Any]] = {"antipasto": {"r": 4}, "trainable_tokens": {"rows": (3, 17, 5)}}
REFUSED = {
    "eva": ll.CalibrationError,
    "hra": ll.UnsupportedLayer,
    "ia3_ff": ll.UnsupportedLayer,
    "oft": ll.UnsupportedLayer,
}
NAMES = SPREAD
FILE = "adapter.safetensors"
IDS = torch.randint(0, 20, (2, 7), generator=torch.Generator().manual_seed(1))


class Scaled(nn.Embedding):
    """As Gemma's."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__(count, width)
        self.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


def model(kind: type[nn.Embedding] = nn.Embedding, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(kind(20, 8), nn.Tanh(), nn.Linear(8, 6)).to(dtype)


def config(name: str, **fields: Any) -> ll.AdapterConfig:
    rank = {"r": 4} if issubclass(ll.get_variant(name).Config, ll.RankConfig) else {}
    return ll.LoraLiteConfig(variant=name, target_names=("0",), **{**rank, **SMALL.get(name, {}), **fields})


def moved(adapter: ll.Adapter) -> ll.Adapter:
    torch.manual_seed(2)
    for parameter in adapter.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return adapter


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_every_variant_is_what_the_merged_table_holds(name: str, kind: type[nn.Embedding], tmp_path: Path) -> None:
    base = model(kind)
    frozen = base(IDS).detach()
    adapter = ll.attach(base, config(name))
    torch.testing.assert_close(base(IDS).detach(), frozen, rtol=0, atol=ll.get_variant(name).identity_atol)
    y = moved(adapter).model(IDS)
    assert float((y - frozen).abs().max().detach()) > 1e-3
    y.square().mean().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    y = y.detach()
    with ll.disabled(base):
        assert torch.equal(base(IDS), frozen)
    ll.save(base, tmp_path / FILE)
    again = model(kind)
    ll.load(again, tmp_path / FILE)
    torch.testing.assert_close(again(IDS).detach(), y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(copy.deepcopy(base)(IDS).detach(), y)
    with ll.merged(base):
        torch.testing.assert_close(base(IDS).detach(), y, rtol=1e-9, atol=1e-9)
    ll.merge(base)
    assert type(base[0]) is kind
    torch.testing.assert_close(base(IDS), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_or_measures_inputs_is_refused(name: str) -> None:
    base = model()
    before = set(dict(base.named_parameters()))
    with pytest.raises(REFUSED[name], match="0 .*embedding"):
        ll.attach(base, config(name), **({"calibration_data": [IDS]} if name == "eva" else {}))
    assert set(dict(base.named_parameters())) == before


def test_a_formula_and_gradients() -> None:
    base = model()
    adapter = moved(ll.attach(base, config("lora", alpha=8)))
    A, B = (parameter.detach().clone().requires_grad_() for parameter in adapter.parameters())
    table = base[0].weight + 2 * (B @ A).T
    expected = F.embedding(IDS, table)
    got = base[0](IDS)
    torch.testing.assert_close(got, expected)
    direction = torch.randn_like(got)
    ours = torch.autograd.grad(got, [*adapter.parameters()], direction)
    for mine, theirs in zip(ours, torch.autograd.grad(expected, (A, B), direction), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", ["lora", "dora", "pissa", "road", "trainable_tokens"])
def test_bfloat16_compile_and_an_empty_batch(name: str) -> None:
    base = model(dtype=torch.float32)
    moved(ll.attach(base, config(name)))
    expected = base(IDS).detach()
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(base, fullgraph=True, backend="aot_eager")(IDS).detach(), expected)
    assert base(IDS[:, :0]).shape == (2, 0, 6)
    low = base.bfloat16()(IDS)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, rtol=0.1, atol=0.05)


def test_gradients_at_the_start_of_an_embedding() -> None:
    base = model()
    base.requires_grad_(False)
    target = moved(ll.attach(base, config("lora"))).layers()["0"]
    loss = lambda output, batch: output.square().mean()  # noqa: E731
    seen = ll.collect_gradients(base, [target], [IDS], loss=loss)
    table = base[0].weight.detach().requires_grad_()
    delta = target.params["lora_B"].detach() @ target.params["lora_A"].detach()
    base[2](torch.tanh(F.embedding(IDS, table + delta.T))).square().mean().backward()
    torch.testing.assert_close(seen["0"], table.grad.T)


def test_max_norm_writes_the_weight_and_is_refused() -> None:
    base = nn.Sequential(nn.Embedding(20, 8, max_norm=1.0))
    with pytest.raises(ll.UnsupportedLayer, match="0 is an embedding with max_norm=1.0"):
        ll.attach(base, config("lora"))


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
def test_peft_computes_the_same_both_ways(kind: type[nn.Embedding], tmp_path: Path) -> None:
    base = model(kind, torch.float32)
    moved(ll.attach(base, config("lora", alpha=8)))
    y = base(IDS).detach()
    ll.export_peft(base, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(model(kind, torch.float32), tmp_path / "ours")
    torch.testing.assert_close(theirs(IDS), y, rtol=1e-5, atol=1e-6)
    ll.export_lora(base, tmp_path / "as_lora")
    theirs = peft.PeftModel.from_pretrained(model(kind, torch.float32), tmp_path / "as_lora")
    torch.testing.assert_close(theirs(IDS), y, rtol=1e-5, atol=1e-5)
    made = peft.get_peft_model(
        model(kind, torch.float32), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"])
    )
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    made.eval().save_pretrained(tmp_path / "theirs")
    back = model(kind, torch.float32)
    assert [*ll.import_peft(back, tmp_path / "theirs").targets] == ["0", "2"]
    torch.testing.assert_close(back(IDS), made(IDS), rtol=1e-5, atol=1e-5)


def llama(tied: bool) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def test_new_tokens_are_trained_alone_and_the_head_stays_tied(tmp_path: Path) -> None:
    model = llama(tied=True)
    model.resize_token_embeddings(23, mean_resizing=False)
    frozen, ids = model(IDS).logits.detach(), torch.cat([IDS, torch.tensor([[20, 21], [22, 20]])], 1)
    adapter = ll.attach(model, ll.LoraLiteConfig(variant="trainable_tokens", rows=(20, 21, 22)))
    assert adapter.targets == ("model.embed_tokens", "lm_head")
    assert [p.shape for p in adapter.parameters()] == [(3, 16)]
    assert torch.equal(model(IDS).logits, frozen)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    table = model.model.embed_tokens.weight.detach()
    y = model(ids).logits.detach()
    ll.save(model, tmp_path / FILE)
    again = llama(tied=True)
    again.resize_token_embeddings(23, mean_resizing=False)
    again.model.embed_tokens.weight.data[20:].normal_()  # a new session draws the new rows anew
    ll.load(again, tmp_path / FILE)
    torch.testing.assert_close(again(ids).logits.detach(), y, rtol=1e-4, atol=1e-5)
    ll.merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight[:20], table[:20])
    assert not torch.equal(model.lm_head.weight[20:], table[20:])
    torch.testing.assert_close(model(ids).logits, y, rtol=1e-4, atol=1e-5)


def test_a_head_that_is_not_tied_is_left_alone() -> None:
    model = llama(tied=False)
    assert ll.attach(model, ll.LoraLiteConfig(variant="trainable_tokens", rows=(3,))).targets == ("model.embed_tokens",)


def test_an_adapter_on_a_tied_embedding_says_that_it_acts_on_one_of_two() -> None:
    model = llama(tied=True)
    cfg = ll.LoraLiteConfig(variant="lora", r=2, target_names=("embed_tokens",), exclude_names=())
    with pytest.warns(UserWarning, match=r"model.embed_tokens has the weight of lm_head, too, and is adapted alone"):
        moved(ll.attach(model, cfg))
    with pytest.raises(ll.MergeError, match=r"is also that of lm_head: merging would change both"):
        ll.merge(model)


def test_rows_that_are_none() -> None:
    make = ll.LoraLiteConfig
    for rows in ((), (1, 1), (-1,), (True,), 3):
        with pytest.raises(ll.ConfigError, match=r"TrainableTokensConfig\(rows=.*give the tokens' ids, each once"):
            make(variant="trainable_tokens", rows=rows)
    with pytest.raises(ll.ConfigError, match=r"embed_tokens: .*rows=\(…, 20\)\): the layer has rows 0 to 19"):
        ll.attach(llama(True), make(variant="trainable_tokens", rows=(20,)))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")  # PEFT's, of its own config
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("beside", ["alone", "lora", "head"])
def test_tokens_of_peft_both_ways(beside: str, tied: bool, tmp_path: Path) -> None:
    cfg: Any = {
        "alone": peft.TrainableTokensConfig(token_indices=[3, 7]),
        "lora": peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[7, 3]),
        "head": peft.LoraConfig(
            r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 7], "lm_head": [5, 2]}
        ),
    }[beside]
    if beside == "head" and tied:
        pytest.skip("PEFT then trains one weight in two ways")
    theirs = peft.get_peft_model(llama(tied), cfg)
    torch.manual_seed(3)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    theirs.eval().save_pretrained(tmp_path / "theirs")
    expected = theirs(IDS).logits.detach()
    ours = llama(tied)
    ll.import_peft(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(IDS).logits.detach(), expected, rtol=1e-4, atol=1e-5)
    variants = {name: adapter.cfg.variant for name, adapter in ll.adapters(ours).items()}
    tokens = {"default_trainable_tokens": "trainable_tokens"}
    assert variants == ({"default": "trainable_tokens"} if beside == "alone" else {"default": "lora", **tokens})
    if beside == "alone":
        ll.export_peft(ours, tmp_path / "ours")
        back = peft.PeftModel.from_pretrained(llama(tied), tmp_path / "ours")
        torch.testing.assert_close(back(IDS).logits.detach(), expected, rtol=1e-4, atol=1e-5)
