"""The language model: from the hub or a folder, in its dtype or quantised, on this process's device."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

import lora_lite_core as ll
from lora_lite_core.contract.errors import listed
from lora_lite_core.contract.text import plain

from ..lookup import TaskError, model_of

FOUR_BIT = ("nf4", "fp4")
QUANTIZED = (*FOUR_BIT, "int8")


def device() -> torch.device:
    """This process's GPU, where there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def check(model: str, quantize: str) -> None:
    """Whether the model can be found and the packages are there, before anything is trained. Raises TaskError."""
    for name in ("accelerate", *(["bitsandbytes"] if quantize else [])):
        if find_spec(name) is None:
            extra = "lora-lite-bench[gsm8k]" if name == "accelerate" else name
            raise TaskError(f"task 'gsm8k' needs {name}; type: pip install '{extra}'")
    with model_of(model):
        AutoConfig.from_pretrained(model)


def tokenizer_of(model: str) -> Any:
    """The model's tokenizer, which pads with a token that it has (or the end of text). Raises TaskError for one that
    cannot end a text."""
    with model_of(model):
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
    if not tokenizer.tokenize("Question: 1 + 2"):  # transformers makes an empty one where the files are not there
        raise TaskError(f"the tokenizer of {plain(model)} knows no words: its files, as tokenizer.json, are not there")
    if tokenizer.eos_token_id is None:
        raise TaskError(f"the tokenizer of {plain(model)} has no end-of-text token: answers could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load(model: str, dtype: torch.dtype, quantize: str, checkpointing: bool) -> tuple[nn.Module, Any]:
    """The model in eval mode, and its tokenizer. Raises TaskError for a model without all of its weights, or a
    tokenizer that is not its own."""
    tokenizer = tokenizer_of(model)
    more: dict[str, Any] = {"quantization_config": _bitsandbytes(quantize, dtype)} if quantize else {}
    with model_of(model):
        found: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, device_map={"": device()}, output_loading_info=True, **more
        )
    loaded, report = found
    if missing := sorted(report["missing_keys"]):
        raise TaskError(
            f"{plain(model)} has no {plain(listed(missing, 4))}: the language model would begin with random weights "
            "there; give --model a model that was saved with them"
        )
    if len(tokenizer) > (rows := loaded.get_input_embeddings().weight.shape[0]):
        raise TaskError(
            f"the tokenizer of {plain(model)} has {len(tokenizer):,} tokens, the model's embedding {rows:,}: they are "
            "not of one model"
        )
    if checkpointing:
        enable = getattr(loaded, "activation_checkpointing_enable", None) or loaded.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    loaded.generation_config = GenerationConfig()  # what it brings, as a repetition penalty, is not greedy
    if quantize in FOUR_BIT:
        ll.prepare(loaded)  # the frozen base computes as those with adapters do
    return loaded.eval(), tokenizer


def _bitsandbytes(quantize: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of its casts at every layer and step
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quantize, bnb_4bit_compute_dtype=dtype)
