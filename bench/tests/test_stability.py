"""Every variant's defaults train: with the learning rate that is usual for the method, nothing diverges."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lora_lite_bench.runs.methods import config_for, fitting
from lora_lite_bench.speed.contestants import attach_ours
from lora_lite_bench.tasks import make_task
from lora_lite_bench.tasks.language.arithmetic import Split, problem
from lora_lite_bench.tasks.language.base_model import PACKAGED, encode, load_base, loss_of
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import lora_lite as ll
from tests.usual import SPREAD, USUAL_LR

pytestmark = pytest.mark.slow

TASK = make_task("shifted", {})

VARIANTS = [name for name in SPREAD if name != "trainable_tokens"]  # which trains single tokens


def assert_trains(
    loss: Callable[[Any], Tensor], batch: Callable[[Split], Any], groups: list[dict[str, Any]], steps: int
) -> None:
    """The loss stays finite and never far above its start, and is lower on other problems in the end."""
    held_out = batch("valid")
    with torch.no_grad():
        before = loss(held_out).item()
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for _ in range(steps):
        value = loss(batch("train"))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    with torch.no_grad():
        after = loss(held_out).item()
    assert all(map(math.isfinite, losses))
    assert max(losses) < 1.5 * before
    assert after < before


@pytest.mark.parametrize("name", VARIANTS)
def test_on_the_shifted_task(name: str) -> None:
    model, tokenizer = load_base()
    rng = random.Random(0)

    def batch(split: Split) -> dict[str, Tensor]:
        return encode(tokenizer, [problem("shifted", split, rng) for _ in range(24)])

    calibration = [{key: value for key, value in batch("train").items() if key != "weights"} for _ in range(4)]
    attach_ours(model, config_for(TASK, name, fitting(TASK, name, {})), calibration)
    groups = ll.param_groups(model, lr=USUAL_LR[name])
    assert len(list(ll.adapters(model)["default"].parameters())) == sum(len(group["params"]) for group in groups)
    assert_trains(lambda data: loss_of(model, data), batch, groups, 30)


def over_hundred(split: Split, count: int, rng: random.Random, tokenizer: Any) -> dict[str, Tensor]:
    """Questions of the shifted task, and whether the answer has three digits."""
    asked = [problem("shifted", split, rng) for _ in range(count)]
    text = tokenizer([p.question for p in asked], padding=True, return_tensors="pt")
    return {
        "input_ids": text["input_ids"],
        "attention_mask": text["attention_mask"],
        "labels": torch.tensor([len(p.answer) > 2 for p in asked]).long(),
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_on_a_classification_task(name: str) -> None:
    """The pretrained model with a new head, which is trained beside the adapter."""
    _, tokenizer = load_base()
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(PACKAGED, num_labels=2, dtype=torch.float32)
    rng = random.Random(0)
    calibration = [
        {key: value for key, value in over_hundred("train", 24, rng, tokenizer).items() if key != "labels"}
        for _ in range(4)
    ]
    cfg = config_for(TASK, name, {**fitting(TASK, name, {}), "exclude_names": ("score",)})
    attach_ours(model, cfg, calibration)
    model.score.requires_grad_(True)
    groups = [*ll.param_groups(model, lr=USUAL_LR[name]), {"params": [model.score.weight], "lr": 1e-2}]
    assert_trains(lambda data: model(**data).loss, lambda split: over_hundred(split, 24, rng, tokenizer), groups, 40)
    asked = over_hundred("test", 300, rng, tokenizer)
    with torch.no_grad():
        right = (model.eval()(**asked).logits.argmax(-1) == asked["labels"]).float().mean()
    assert right > 0.85
