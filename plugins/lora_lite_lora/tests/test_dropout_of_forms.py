"""Dropout of what the adapter reads, in all forms of LoRA that have it; the frozen layer gets all of its input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lora_lite as ll
from tests.oracles import D_IN, D_OUT

FIELDS: dict[str, dict[str, Any]] = {"alora": {"invocation_tokens": (1,)}, "qalora": {"group_size": 4}}
FIELDS |= {"gralora": {"hybrid_r": 2}}
NAMES = ["alora", "gralora", "lora_fa", "melora", "miss", "molora", "mora", "moslora", "qalora"]


@pytest.mark.parametrize("name", NAMES)
def test_dropout(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D_IN, D_OUT)).double()
    adapter = ll.attach(model, ll.LoraLiteConfig(variant=name, r=4, dropout=0.4, **FIELDS.get(name, {})))
    for bare, parameter in adapter.named_tensors():
        if bare.endswith("lora_G"):  # a mixture's router reads all of the input: let it say the same of any
            nn.init.zeros_(parameter)
        elif parameter.requires_grad:
            nn.init.normal_(parameter)
    x = torch.randn(50, D_IN, dtype=torch.float64)
    torch.manual_seed(7)
    kept = F.dropout(x, 0.4)
    with ll.disabled(model):
        base, base_of_kept = model(x), model(kept)
    expected = base + model.eval()(kept) - base_of_kept
    torch.manual_seed(7)
    torch.testing.assert_close(model.train()(x), expected)
    assert not torch.allclose(expected, model.eval()(x))
