"""The architectures people use, from tiny configs: which layers are called, and that nothing is silently wrong there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lora_lite as ll

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 64, **SIZES}
VISION = {**SIZES, "image_size": 16, "patch_size": 8}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}


def of(config: str, model: str, **sizes: Any) -> Callable[[], Any]:
    def make() -> Any:
        torch.manual_seed(0)
        return getattr(transformers, model)(getattr(transformers, config)(**sizes)).eval()

    return make


MODELS: dict[str, tuple[Callable[[], Any], dict[str, Tensor]]] = {
    "llama": (of("LlamaConfig", "LlamaForCausalLM", **TEXT), {"input_ids": IDS}),
    "qwen3": (of("Qwen3Config", "Qwen3ForCausalLM", **TEXT, **GROUPED), {"input_ids": IDS}),
    "qwen3_moe": (
        of(
            "Qwen3MoeConfig",
            "Qwen3MoeForCausalLM",
            **TEXT,
            **GROUPED,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
        ),
        {"input_ids": IDS},
    ),
    "mixtral": (
        of("MixtralConfig", "MixtralForCausalLM", **TEXT, num_key_value_heads=2, num_local_experts=4),
        {"input_ids": IDS},
    ),
    "gemma": (of("GemmaConfig", "GemmaForCausalLM", **TEXT, **GROUPED), {"input_ids": IDS}),
    "gpt2": (
        of("GPT2Config", "GPT2LMHeadModel", vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, **ENDS),
        {"input_ids": IDS},
    ),
    "bert": (of("BertConfig", "BertForSequenceClassification", **TEXT, max_position_embeddings=16), {"input_ids": IDS}),
    "t5": (
        of(
            "T5Config",
            "T5ForConditionalGeneration",
            vocab_size=64,
            d_model=32,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            d_kv=8,
        ),
        {"input_ids": IDS, "decoder_input_ids": IDS},
    ),
    "vit": (of("ViTConfig", "ViTForImageClassification", **VISION), {"pixel_values": PIXELS}),
    "clip": (
        of(
            "CLIPConfig",
            "CLIPModel",
            text_config={**TEXT, **ENDS, "max_position_embeddings": 16},
            vision_config=VISION,
            projection_dim=16,
        ),
        {"input_ids": IDS, "pixel_values": PIXELS},
    ),
    "siglip": (
        of(
            "SiglipConfig",
            "SiglipModel",
            text_config={**TEXT, **ENDS, "max_position_embeddings": 16},
            vision_config=VISION,
        ),
        {"input_ids": IDS, "pixel_values": PIXELS},
    ),
    "whisper": (
        of(
            "WhisperConfig",
            "WhisperForConditionalGeneration",
            vocab_size=64,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=16,
            decoder_start_token_id=1,
            **ENDS,
        ),
        {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": IDS},
    ),
    "mamba": (
        of("MambaConfig", "MambaForCausalLM", vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4, **ENDS),
        {"input_ids": IDS},
    ),
}
SILENT = {
    "siglip": ("vision_model.head.attention.out_proj",),
    "mamba": ("backbone.layers.0.mixer.dt_proj", "backbone.layers.1.mixer.dt_proj"),
}
LEAVE_OUT = {"siglip": "vision_model.head.attention.out_proj", "mamba": "dt_proj"}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def result(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out: Any = model(**inputs)
    return out.logits if hasattr(out, "logits") else out.logits_per_image


@pytest.mark.parametrize("name", MODELS)
def test_coverage_tells_what_is_out_of_reach(name: str) -> None:
    make, inputs = MODELS[name]
    model = make()
    seen = ll.coverage(model, **inputs)
    assert seen.silent == SILENT.get(name, ())
    assert seen.total == sum(p.numel() for p in model.parameters())
    experts = {"qwen3_moe", "mixtral"} & {name}
    assert any("experts" in parameter for parameter in seen.beyond) == bool(experts)
    assert (seen.share < 0.4) == bool(experts)


@pytest.mark.parametrize("name", LEAVE_OUT)
def test_layers_that_are_read_without_a_call_are_refused(name: str) -> None:
    make, inputs = MODELS[name]
    model = make()
    with pytest.raises(ll.UnsupportedLayer, match="reads its weight without calling it, .* add exclude_names="):
        ll.attach(model, ll.LoRAConfig(r=2), check_inputs=inputs)


@pytest.mark.parametrize("method", ["lora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dora", "hra"))])
@pytest.mark.parametrize("name", MODELS)
def test_adapters_train_merge_and_come_back(name: str, method: str, tmp_path: Path) -> None:
    make, inputs = MODELS[name]
    model = make().requires_grad_(False)
    base = result(model, inputs)
    # torch.matmul folds a transposed batch into one product only for weights that require a gradient, which differs in
    # the last digit in siglip (attention) and mamba (x_proj): measured 1e-7. So the base is a frozen one.
    torch.testing.assert_close(result(make(), inputs), base, rtol=1e-5, atol=1e-6)
    left_out = ("lm_head", "embed_tokens", *([LEAVE_OUT[name]] if name in LEAVE_OUT else []))
    excluded = tuple(
        p for p in left_out if p in ("lm_head", "embed_tokens") or any(p in n for n, _ in model.named_modules())
    )
    adapter = ll.attach(model, ll.LoraLiteConfig(variant=method, r=2, exclude_names=excluded), check_inputs=inputs)
    torch.testing.assert_close(result(model, inputs), base, rtol=0, atol=0 if method != "hra" else 1e-5)
    out: Any = model(**inputs)
    (out.logits if hasattr(out, "logits") else out.logits_per_image).square().sum().backward()
    assert {
        key.rpartition(".")[0] for key, t in adapter.named_tensors() if t.grad is not None and bool(t.grad.any())
    } == set(adapter.targets)
    torch.manual_seed(1)
    for p in adapter.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    changed = result(model, inputs)
    assert not torch.allclose(changed, base, atol=1e-4)
    adapter.save(tmp_path / "a.safetensors")
    again = make()
    ll.load(again, tmp_path / "a.safetensors")
    assert torch.equal(result(again, inputs), changed)
    with ll.merged(model):
        torch.testing.assert_close(result(model, inputs), changed, rtol=1e-4, atol=1e-5)
    adapter.detach()
    assert torch.equal(result(model, inputs), base)
