"""The protocols by name: whose numbers ours are to be set beside, and all that they fix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..interface import Protocol

BASE = "Qwen/Qwen3.5-0.8B-Base"
PROMPT = "Question: {query} Think step by step.\nAnswer:"
FULL = "(full fine-tuning)"
TEN = ("lora", "dora", "pissa", "eva", "lora_xs", "delora", "hra", "ia3", "ia3_ff", "antipasto")

LORA_LITE = Protocol(
    knobs={},  # the task's defaults
    fields={"target_names": ("down_proj$",), "r": 32, "alpha": 64},
    special={
        "pissa": {"alpha": 32},
        "eva": {"alpha": 64},
        "lora_xs": {"alpha": 32},
        "antipasto": {"r": 256},
        "ia3": {"target_names": ("k_proj$", "v_proj$")},
    },
    lr=1e-4,
    rates={"delora": 1e-3, "ia3": 5e-3, "ia3_ff": 5e-3, "antipasto": 5e-3, "lora_xs": 4e-3, FULL: 1e-5},
    methods=TEN,
)
QV: Mapping[str, Any] = {"target_names": ("q_proj$", "v_proj$")}
PEFT = Protocol(
    knobs={
        "model": "meta-llama/Llama-3.2-3B",
        "batch_size": 4,
        "steps": 5000,
        "between": "",
        "trained_on": "all",
        "answers": "stated",
        "scored_at_once": 51,
    },
    fields={**QV, "r": 32, "alpha": 64},
    special={
        "ia3": {"target_names": ("k_proj$", "v_proj$")},
        "ia3_ff": {"target_names": ("down_proj$",)},
        "antipasto": {"r": 256},
    },
    lr=1e-4,
    rates={"delora": 1e-3, "ia3": 5e-3, "ia3_ff": 5e-3, "road": 1e-3, "lora_xs": 4e-3, "antipasto": 5e-3, FULL: 1e-5},
    methods=(*TEN, "oft", "road"),
)
PROTOCOLS: Mapping[str, Protocol] = {"lora-lite": LORA_LITE, "peft": PEFT}
