"""coverage and check_inputs: which layers a model really calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lora_lite as ll

from .models import net, token_ids
from .test_attach import snapshot


class Odd(nn.Module):
    """A branch that is never taken, and attention that reads its output layer's weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 4)
        self.attention = nn.MultiheadAttention(8, 2)
        self.experts = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x: torch.Tensor, *, flip: bool = False) -> torch.Tensor:
        y, _ = self.attention(x, x, x)
        y = self.used(y) @ self.experts[0]
        return self.unused(y) if flip else y


def test_what_is_called_and_what_is_not() -> None:
    model = Odd()
    seen = ll.coverage(model, torch.randn(5, 8))
    assert seen.fired == ("used",)
    assert seen.silent == ("unused", "attention.out_proj")
    assert seen.reached == 72
    assert seen.total == sum(p.numel() for p in model.parameters())
    assert list(seen.beyond.items())[:2] == [("experts", 192), ("attention.in_proj_weight", 192)] or set(
        list(seen.beyond)[:2]
    ) == {"experts", "attention.in_proj_weight"}
    assert seen.share == 72 / seen.total
    assert repr(seen).startswith(
        "<Coverage: 1 of 3 targets called; never called: unused, attention.out_proj; adapters can reach 12."
    )
    assert set(ll.coverage(model, torch.randn(5, 8), flip=True).fired) == {"used", "unused"}


def test_with_adapters_their_targets_count() -> None:
    model = net()
    ll.attach(model, ll.LoRAConfig(r=2, target_names=("q_proj",)))
    before = snapshot(model)
    seen = ll.coverage(model, token_ids())
    assert seen.silent == ()
    assert all(name.endswith("q_proj") for name in seen.fired)
    assert not any("lora_" in name for name in seen.beyond)
    base = net()
    assert seen.total == sum(p.numel() for p in base.parameters())
    assert snapshot(model) == before
    assert not any(m._forward_hooks for name, m in model.named_modules() if not name.endswith("q_proj"))


def test_the_run_leaves_modes_and_statistics_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model[2].eval()
    ll.coverage(model, torch.randn(6, 4))
    assert [m.training for m in model] == [True, True, False]
    assert int(model[1].num_batches_tracked) == 0


def test_models_that_look_at_values_are_run_for_real() -> None:
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.large(x) if x.sum().item() > 0 else self.small(x)

    assert ll.coverage(Choosing(), torch.ones(2, 4)).silent == ("small",)
    assert ll.coverage(Choosing(), -torch.ones(2, 4)).silent == ("large",)


def test_errors_of_the_model_itself_come_through() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        ll.coverage(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 5))


@pytest.mark.parametrize(
    "batch", [torch.randn(5, 8), (torch.randn(5, 8),), {"x": torch.randn(5, 8)}], ids=["tensor", "tuple", "dict"]
)
def test_attach_checks_inputs_when_asked(batch: Any) -> None:
    model = Odd()
    before = snapshot(model)
    with pytest.raises(
        ll.TargetError,
        match=r"check_inputs: 1 target of 2 never called, .*: unused\n  leave them out",
    ):
        ll.attach(model, ll.LoRAConfig(r=2, exclude_names=("out_proj",)), check_inputs=batch)
    assert snapshot(model) == before
    ll.attach(model, ll.LoRAConfig(r=2, target_names=("^used",)), check_inputs=batch)


def test_caches_that_a_forward_fills_stay_real() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("cos", torch.ones(1, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > len(self.cos):
                self.cos = torch.ones(len(x), 8)
                self.length = torch.tensor(len(x))
            return self.linear(x) * self.cos

    model = Caching()
    ll.coverage(model, torch.randn(5, 8))
    assert type(model.cos) is torch.Tensor
    assert not hasattr(model, "length")
    assert type(model(torch.randn(5, 8))) is torch.Tensor
