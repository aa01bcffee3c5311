"""A base model with a tokenizer in a folder, and adapter files on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lora_lite as ll

SERVED = ("lora", "pissa", "hra", "delora", "lora_xs", "ssvd", "antipasto", "eva")
REFUSED = ("ia3", "oft")
FIELDS: dict[str, dict[str, Any]] = {
    "antipasto": {"r": 4},
    "ssvd": {"r": 4},
    "ia3": {},
    "oft": {"block_size": 8},
}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers and a tokenizer of 128 words, w0 to w127."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("served") / "base"
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1").save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=128,  # heads of 32: vLLM has no smaller ones on a CPU
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    ).save_pretrained(folder)
    return folder


def fresh(base: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(base).eval()


def moved(base: Path, variant: str, **fields: Any) -> Any:
    """The base with an adapter that changes what it says."""
    model = fresh(base)
    rank = {} if variant in FIELDS else {"r": 4}
    cfg = ll.LoraLiteConfig(variant=variant, **{**rank, **FIELDS.get(variant, {}), **fields})
    data = {"calibration_data": [{"input_ids": torch.arange(24).view(2, 12)}]} if variant == "eva" else {}
    adapter = ll.attach(model, cfg, **data)
    torch.manual_seed(1)
    for parameter in adapter.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def adapters(base: Path) -> Path:
    """A folder with NAME.safetensors of every variant, and wide.safetensors: a LoRA of rank 24."""
    folder = base.parent / "adapters"
    folder.mkdir()
    for variant in (*SERVED, *REFUSED):
        ll.save(moved(base, variant), folder / f"{variant}.safetensors")
    ll.save(moved(base, "lora", r=24), folder / "wide.safetensors")
    return folder
