"""Speed that is promised: ratios in one process, interleaved, medians of processor time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
from torch import nn

import lora_lite as ll


def model_of_200_layers() -> nn.Module:
    return nn.Sequential(*(nn.Linear(256, 256) for _ in range(200)))


def processor_time(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def test_attaching_is_faster_than_get_peft_model() -> None:
    peft = pytest.importorskip("peft")
    names = [str(i) for i in range(200)]
    theirs = peft.LoraConfig(r=8, lora_alpha=8, target_modules=names)
    ours_s, theirs_s = [], []
    for _ in range(5):
        first, second = model_of_200_layers(), model_of_200_layers()
        ours_s.append(processor_time(lambda m=first: ll.attach(m, ll.LoRAConfig(r=8))))
        theirs_s.append(processor_time(lambda m=second: peft.get_peft_model(m, theirs)))
    assert statistics.median(ours_s) < statistics.median(theirs_s)
