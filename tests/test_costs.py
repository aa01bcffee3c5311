"""Parameters and multiply-accumulates per token as the docstrings of LoRA's forms, of the variants of singular vectors and
of the AntiPaSTO family state them, beside what is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lora_lite as ll

bench = pytest.importorskip("lora_lite_bench.machine.costs")

Costs = Callable[[int, int, int, Any], tuple[int, int]]  # of d_in, d_out, r and the config: parameters, MACs


def low_rank(i: int, o: int, r: int, cfg: Any) -> tuple[int, int]:
    return r * (i + o), r * (i + o)


def offsets(i: int, o: int, r: int, cfg: Any) -> tuple[int, int]:
    return r * (i + o), 2 * r * (i + o)


def gates(i: int, o: int, r: int, cfg: Any) -> tuple[int, int]:
    return r * (i + o + 1), r * (i + o)


CASES: list[tuple[str, dict[str, Any], Costs]] = [
    *((name, {}, low_rank) for name in ("lora", "melora", "dylora", "eva")),
    ("alora", {"invocation_tokens": (1,)}, low_rank),
    *((name, {}, offsets) for name in ("pissa", "olora", "corda", "lora_ga", "spectral")),
    *((name, {}, gates) for name in ("adalora", "sora")),
    ("kasa", {}, lambda i, o, r, cfg: (r * (i + o + 1), 2 * r * (i + o))),
    ("lora_fa", {}, lambda i, o, r, cfg: (r * o, r * (i + o))),
    ("molora", {"experts": 3}, lambda i, o, r, cfg: (3 * (r * i + r * o + i),) * 2),
    ("moslora", {}, lambda i, o, r, cfg: (r * (i + o) + r * r,) * 2),
    ("gralora", {"hybrid_r": 2}, lambda i, o, r, cfg: ((r + 2) * (i + o),) * 2),
    ("qalora", {"group_size": 4}, lambda i, o, r, cfg: (r * (i // 4 + o),) * 2),
    ("miss", {}, lambda i, o, r, cfg: (o * r,) * 2),
    ("miss", {"mode": "mini", "mini_r": 2}, lambda i, o, r, cfg: (2 * r,) * 2),
    ("miss", {"mode": "bat"}, lambda i, o, r, cfg: (o * r, i * o)),
    ("mora", {"kind": "sharing"}, lambda i, o, r, cfg: (cfg.size(i, o) ** 2,) * 2),
    ("mora", {}, lambda i, o, r, cfg: (cfg.size(i, o) ** 2, cfg.size(i, o) ** 2 * -(-min(i, o) // cfg.size(i, o)))),
    ("lora_sb", {}, lambda i, o, r, cfg: (r * r, r * (i + o + r))),
    ("lora_xs", {}, lambda i, o, r, cfg: (r * r, r * (i + o) + r * r)),
    ("ssvd", {}, lambda i, o, r, cfg: (r + r * (r - 1) // 2, r * (i + o) + r * r)),
    ("svf", {"r": None}, lambda i, o, r, cfg: (min(i, o), 2 * min(i, o) ** 2)),
    ("svft", {"off_diagonal": 2}, lambda i, o, r, cfg: (r + 2 * (r - 1) + 2 * (r - 2), r * (i + o))),
    ("antipasto", {}, lambda i, o, r, cfg: (r + r * 3 // 2, r * (i + o) + r * 4)),
    ("antipasto", {"rotate_basis": "both"}, lambda i, o, r, cfg: (r + r * 3, r * (i + o) + 2 * r * 4)),
    ("antipasto_gain", {}, lambda i, o, r, cfg: (r, r * (i + o))),
    ("antipasto_mix", {"k": 3}, lambda i, o, r, cfg: (r + 2 * r * 3, r * (i + o) + 2 * r * 3)),
    ("antipasto_ablate", {"k": 3}, lambda i, o, r, cfg: (r * 3 + 3, r * (i + o) + 2 * r * 3)),
]


@pytest.mark.parametrize("sizes", [(64, 32, 4), (32, 64, 8), (48, 48, 4), (24, 96, 4)], ids=str)
@pytest.mark.parametrize(
    ("name", "fields", "costs"), CASES, ids=[f"{name} {fields or ''}" for name, fields, _ in CASES]
)
def test_costs(name: str, fields: dict[str, Any], costs: Costs, sizes: tuple[int, int, int]) -> None:
    d_in, d_out, r = sizes
    given = {key: value for key, value in {"r": r, **fields}.items() if value is not None}
    cfg, model = ll.LoraLiteConfig(variant=name, **given), nn.Sequential(nn.Linear(d_in, d_out))
    data = [torch.randn(200, d_in)] if name in ("corda", "eva", "lora_ga", "lora_sb") else None
    adapter = ll.attach(model, cfg, calibration_data=data)
    counted = bench.added_macs_per_token(model, {"input": torch.randn(2, 10, d_in)})
    assert (sum(p.numel() for p in adapter.parameters()), counted) == costs(d_in, d_out, r, cfg)
