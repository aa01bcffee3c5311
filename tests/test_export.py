"""Adapters as PEFT directories: opened by the peft package itself, they give the same logits."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lora_lite as ll

from .test_variants import config

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's and transformers' own
LOW_RANK = ("lora", "pissa", "eva", "lora_xs", "hra", "delora", "ssvd", "antipasto")


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "num_attention_heads": 4, **changes})).eval()


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2)).eval()


TOKENS = torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def moved(model: nn.Module, cfg: ll.AdapterConfig, size: float = 0.05, **options: Any) -> ll.Adapter:
    adapter = ll.attach(model, cfg, **options)
    torch.manual_seed(2)
    for p in adapter.parameters():
        p.data.add_(size * torch.randn_like(p))
    return adapter


def opened_by_peft(base: Any, folder: Path) -> torch.Tensor:
    return logits(peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval())


@pytest.mark.parametrize("name", LOW_RANK)
def test_low_rank_methods_are_exact(name: str, tmp_path: Path) -> None:
    base = llama()
    model = copy.deepcopy(base)
    cfg = config(name, target_names=(r"layers\.0\..*_proj", r"q_proj", "down_proj"))
    moved(model, cfg, calibration_data=[TOKENS] * 3 if name == "eva" else None)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = logits(model)
    assert not torch.allclose(expected, logits(base), atol=1e-3)
    done = ll.export_lora(model, tmp_path / "out")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert max(done.errors.values()) < 1e-5
    torch.testing.assert_close(opened_by_peft(base, tmp_path / "out"), expected, rtol=1e-4, atol=2e-5)
    transformers_own = copy.deepcopy(base)
    transformers_own.load_adapter(str(tmp_path / "out"))
    torch.testing.assert_close(logits(transformers_own), expected, rtol=1e-4, atol=2e-5)


def test_what_servers_ask_for(tmp_path: Path) -> None:
    model = llama()
    cfg = ll.LoRAConfig(r=4, alpha=12, rslora=True, target_names=("q_proj", "v_proj"), rank_pattern={"v_proj": 2})
    moved(model, cfg)
    done = ll.export_lora(model, tmp_path / "out")
    assert done.rank == 4
    assert repr(done).startswith("<LoRAExport: rank 4, 4 layers in ")
    written = json.loads((tmp_path / "out/adapter_config.json").read_text(encoding="utf-8"))
    assert (written["r"], written["lora_alpha"], written["use_rslora"], written["bias"]) == (4, 4, False, "none")
    assert written["target_modules"] == ["q_proj", "v_proj"]
    assert written["peft_type"] == "LORA"
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    for key, tensor in tensors.items():
        assert key.startswith("base_model.model.model.layers.")
        assert key.endswith((".lora_A.weight", ".lora_B.weight"))
        assert 4 in tensor.shape
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "lora_lite_export.json",
    ]


def test_some_layers_only(tmp_path: Path) -> None:
    base = llama()
    model = copy.deepcopy(base)
    moved(model, ll.LoRAConfig(r=2, target_names=("q_proj",), layers=(1,)))
    ll.export_lora(model, tmp_path / "out")
    written = json.loads((tmp_path / "out/adapter_config.json").read_text(encoding="utf-8"))
    assert written["target_modules"] == ["1.self_attn.q_proj"]
    torch.testing.assert_close(opened_by_peft(base, tmp_path / "out"), logits(model), rtol=1e-4, atol=1e-5)


def test_conv1d(tmp_path: Path) -> None:
    base = gpt2()
    model = copy.deepcopy(base)
    moved(model, ll.LoRAConfig(r=3))
    ll.export_lora(model, tmp_path / "out")
    torch.testing.assert_close(opened_by_peft(base, tmp_path / "out"), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dora", "oft", "road", "ia3", "ia3_ff"])
def test_full_rank_methods_need_a_rank(name: str, tmp_path: Path) -> None:
    base = llama()
    model = copy.deepcopy(base)
    moved(model, config(name), size=0.02)
    with pytest.raises(
        ll.MergeError, match=r"needs rank \d\d .*\n  relative error of the worst layer by rank: 4: 0\.\d"
    ):
        ll.export_lora(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    few, many = (ll.export_lora(model, tmp_path / f"{rank}", rank=rank) for rank in (8, 48))
    assert max(many.errors.values()) < max(few.errors.values()) < 1
    assert (opened_by_peft(base, tmp_path / "48") - logits(model)).norm() < (logits(base) - logits(model)).norm()


def test_a_fresh_adapter_and_another_dtype(tmp_path: Path) -> None:
    model = llama()
    adapter = ll.attach(model, ll.LoRAConfig(r=8))
    assert ll.export_lora(model, tmp_path / "zero").rank == 1
    adapter.detach()
    moved(model, ll.LoRAConfig(r=2))
    done = ll.export_lora(model, tmp_path / "half", dtype="bfloat16")
    assert 1e-4 < max(done.errors.values()) < 1e-2
    assert {t.dtype for t in load_file(tmp_path / "half/adapter_model.safetensors").values()} == {torch.bfloat16}


def test_shifts_of_the_bias_are_refused(tmp_path: Path) -> None:
    model = gpt2()
    moved(model, ll.IA3Config(target_names=("c_attn",)))
    model.transformer.h[0].attn.c_attn.bias.data.fill_(0.1)
    with pytest.raises(ll.MergeError, match="shifts the bias of transformer.h.0.attn.c_attn, which a LoRA cannot"):
        ll.export_lora(model, tmp_path / "out", rank=4)


def test_mistakes(tmp_path: Path) -> None:
    model = llama()
    moved(model, ll.LoRAConfig(r=2))
    with pytest.raises(ll.AdapterFileError, match="does not exist; make it first"):
        ll.export_lora(model, tmp_path / "no/where")
    with pytest.raises(ll.ConfigError, match="rank=0: a rank is a whole number from 1"):
        ll.export_lora(model, tmp_path / "out", rank=0)
    for rank in (True, 2.5, "4", -1):
        with pytest.raises(ll.ConfigError, match="a rank is a whole number from 1"):
            ll.export_lora(model, tmp_path / "out", rank=rank)  # type: ignore[arg-type]
    for tol in (float("nan"), -1.0, "x", None, True):
        with pytest.raises(ll.ConfigError, match="tol=.*: the largest relative error is a number from 0"):
            ll.export_lora(model, tmp_path / "out", tol=tol)  # type: ignore[arg-type]
    with pytest.raises(ll.MergeError, match="dtype='int8': an exported adapter is float32, float16 or bfloat16"):
        ll.export_lora(model, tmp_path / "out", dtype="int8")
    with pytest.raises(ll.AdapterNameError, match="no adapter is called 'x'"):
        ll.export_lora(model, tmp_path / "out", name="x")
    ll.attach(model, ll.IA3Config(target_names=("q_proj",)), name="gate")
    with pytest.raises(ll.MergeError, match="carries adapter 'gate', too"):
        ll.export_lora(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_names_that_peft_cannot_tell_apart(tmp_path: Path) -> None:
    model = nn.ModuleDict({"head": nn.Linear(4, 4), "inner": nn.ModuleDict({"head": nn.Linear(4, 4)})})
    moved(model, ll.LoRAConfig(r=1, target_names=(r"^head",)))
    with pytest.raises(ll.MergeError, match="'head' is also the end of 'inner.head', which is not adapted"):
        ll.export_lora(model, tmp_path / "out")


def test_small_layers_keep_the_rank_that_they_were_given(tmp_path: Path) -> None:
    base = llama(num_key_value_heads=1)  # k_proj is 64 → 16
    model = copy.deepcopy(base)
    moved(model, ll.LoRAConfig(r=16, target_names=("q_proj", "k_proj")))
    assert ll.export_lora(model, tmp_path / "out").rank == 16
    torch.testing.assert_close(opened_by_peft(base, tmp_path / "out"), logits(model), rtol=1e-4, atol=2e-5)


def test_factors_that_overflow(tmp_path: Path) -> None:
    model = llama()
    moved(model, ll.LoRAConfig(r=2, alpha=1e12, target_names=("q_proj",)))
    with pytest.raises(ll.MergeError, match="q_proj do not fit torch.float16: they overflow; give dtype='float32'"):
        ll.export_lora(model, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


class Mixed(nn.Module):
    """Layers that are stored both ways, as in models that were put together of others."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(16, 24), Conv1D(16, 24), nn.Linear(16, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(self.first(x).tanh()).tanh())


def mixed_outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.randn(5, 16, generator=torch.Generator().manual_seed(5)))


def checked_with_peft(base: nn.Module, folder: Path, expected: torch.Tensor) -> None:
    """Opened by peft, and merged by it into the weights, which is where a transposed layer would show."""
    opened = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    torch.testing.assert_close(mixed_outputs(opened), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed_outputs(opened.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "pissa", "hra"])
def test_layers_stored_both_ways(name: str, tmp_path: Path) -> None:
    base = Mixed()
    model = copy.deepcopy(base)
    moved(model, config(name, r=4))
    ll.export_lora(model, tmp_path / "out")
    checked_with_peft(base, tmp_path / "out", mixed_outputs(model))


def test_a_method_that_takes_all_there_is_has_no_rank_of_its_own(tmp_path: Path) -> None:
    """SVFT's r=None: its change is refused as every other of full rank, and written at a rank that is given."""
    model = nn.Sequential(nn.Linear(12, 12, bias=False))
    for parameter in ll.attach(model, ll.LoraLiteConfig(variant="svft")).parameters():
        nn.init.normal_(parameter)
    with pytest.raises(ll.MergeError, match="needs rank 12"):
        ll.export_lora(model, tmp_path / "full")
    assert ll.export_lora(model, tmp_path / "cut", rank=4).rank == 4
