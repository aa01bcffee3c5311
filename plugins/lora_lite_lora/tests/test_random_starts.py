"""What the tensors of this package start as: which are zero, and how the others are drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lora_lite as ll

D_IN, D_OUT, R = 640, 480, 160
UNIFORM, NORMAL, ZERO = "uniform", "normal", "zero"
OF_INPUTS = (UNIFORM, D_IN**-0.5)
NOTHING = (ZERO, 0.0)

STARTS: list[tuple[str, dict[str, Any], dict[str, tuple[str, float]]]] = [
    *((name, {}, {"lora_A": OF_INPUTS, "lora_B": NOTHING}) for name in ("lora", "lora_fa", "dylora")),
    ("alora", {"invocation_tokens": (1,)}, {"lora_A": OF_INPUTS, "lora_B": NOTHING}),
    ("lora", {"init": "gaussian"}, {"lora_A": (NORMAL, 1 / R), "lora_B": NOTHING}),
    ("adalora", {}, {"lora_P": (NORMAL, 0.02), "lora_Q": (NORMAL, 0.02), "lora_l": NOTHING}),
    ("sora", {}, {"lora_A": OF_INPUTS, "lora_g": (NORMAL, 1.0), "lora_B": NOTHING}),
    ("kasa", {}, {"lora_A": OF_INPUTS, "lora_l": (NORMAL, 1.0), "lora_B": NOTHING}),
    ("molora", {"experts": 3}, {"lora_A": OF_INPUTS, "lora_G": OF_INPUTS, "lora_B": NOTHING}),
    ("moslora", {"mixer": "kaiming_uniform"}, {"lora_A": OF_INPUTS, "lora_M": (UNIFORM, R**-0.5), "lora_B": NOTHING}),
    ("melora", {"n": 4}, {"lora_A": (UNIFORM, (D_IN / 4) ** -0.5), "lora_B": NOTHING}),
    (
        "gralora",
        {"k": 4, "hybrid_r": R},
        {
            "lora_A": (UNIFORM, (D_IN / 4) ** -0.5),
            "lora_B": NOTHING,
            "lora_A_hybrid": OF_INPUTS,
            "lora_B_hybrid": NOTHING,
        },
    ),
    ("qalora", {"group_size": 4}, {"lora_A": (UNIFORM, (D_IN / 4) ** -0.5), "lora_B": NOTHING}),
    ("miss", {}, {"lora_D": NOTHING}),
    ("mora", {"r": 32}, {"lora_M": NOTHING}),
    ("olora", {}, {"lora_dA": NOTHING, "lora_dB": NOTHING}),
]


@pytest.mark.parametrize(("name", "fields", "starts"), STARTS, ids=[f"{name} {fields}" for name, fields, _ in STARTS])
def test_start(name: str, fields: dict[str, Any], starts: dict[str, tuple[str, float]]) -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    ll.attach(model, ll.LoraLiteConfig(variant=name, **{"r": R, **fields}), seed=5)
    trained = {key for key, p in model[0].named_parameters() if p.requires_grad and key.startswith("lora_")}
    assert trained == set(starts) - ({"lora_A"} if name == "lora_fa" else set())
    for key, (kind, size) in starts.items():
        values = getattr(model[0], key).detach().flatten()
        if kind == ZERO:
            assert not values.any(), key
            continue
        spread = size if kind == NORMAL else size / 3**0.5
        few = len(values) ** -0.5
        assert float(values.std()) == pytest.approx(spread, rel=3 * few), key
        assert abs(float(values.mean())) < 4 * few * spread, key
        beyond = float((values.abs() > spread).float().mean())  # 32 % of a normal distribution, 42 % of a uniform one
        assert beyond == pytest.approx(0.3173 if kind == NORMAL else 1 - 3**-0.5, abs=2 * few), key
        if kind == UNIFORM:
            assert float(values.abs().max()) <= size, key


def test_orthogonal_directions() -> None:
    for r, one in ((R, "rows"), (2 * D_IN, "columns")):
        model = nn.Sequential(nn.Linear(D_IN, D_OUT))
        ll.attach(model, ll.LoRAConfig(r=r, init="orthogonal"))
        A = model[0].lora_A.detach()
        gram = A @ A.T if one == "rows" else A.T @ A
        torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-4)
