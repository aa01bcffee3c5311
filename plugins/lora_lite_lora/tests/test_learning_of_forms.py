"""Variants of this package learn the bench's task: other forms of the product than LoRA's."""

from __future__ import annotations

from typing import Any

import pytest

import lora_lite as ll

FIELDS: dict[str, dict[str, Any]] = {"alora": {"invocation_tokens": (40, 38)}}  # of "How many" behind the full stop
NAMES = ["alora", "gralora", "lora_fa", "melora", "miss", "molora", "mora", "moslora", "poly", "qalora"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_learns(name: str) -> None:
    from lora_lite_bench.runs.run import Job, run

    lr = ll.get_variant(name).bench["lr"]
    fields = FIELDS.get(name, {})
    losses = run(Job("shifted", {"batch_size": 64}, name, fields, seed=0, lr=lr, steps=30, whole=False)).losses
    assert sum(losses[-3:]) / 3 < 0.3 * losses[0], losses
