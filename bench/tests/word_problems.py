"""A tiny Qwen3.5 with a tokenizer trained here, and files of word problems in the columns of MetaMathQA and GSM8K."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3_5ForCausalLM, Qwen3_5TextConfig

NAMES = ("Ann", "Ben", "Cleo", "Dan")
END = "<|endoftext|>"


def problem(rng: random.Random, metamath: bool) -> dict[str, str]:
    """A question and its worked answer: the number of things is repeated."""
    number, name = rng.randint(2, 9), rng.choice(NAMES)
    question = f"{name} has {number} pens. How many pens?"
    worked = f"{name} has {number} pens.\n#### {number}"
    if metamath:
        return {"query": question, "response": f"{worked}\nThe answer is: {number}", "type": "GSM_Rephrased"}
    return {"question": question, "answer": worked}


def write_data(folder: Path, *, train: int = 64, own: int = 12, test: int = 10) -> Path:
    """metamath/train.jsonl, gsm8k/train.jsonl and gsm8k/test.jsonl."""
    rng = random.Random(0)
    sizes = {"metamath/train": train, "gsm8k/train": own, "gsm8k/test": test}
    for name, count in sizes.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [problem(rng, name.startswith("metamath")) for _ in range(count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the problems."""
    rng = random.Random(1)
    rows = [problem(rng, metamath=True) for _ in range(200)]
    texts = [f"Question: {row['query']} Think step by step.\nAnswer: {row['response']}" for row in rows]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=320, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def write_model(folder: Path, **changes: Any) -> Path:
    """A model with both kinds of layers of Qwen3.5, width 64, as save_pretrained writes it."""
    tokenizer = new_tokenizer()
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(0)
    Qwen3_5ForCausalLM(Qwen3_5TextConfig(**{**sizes, **changes})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
