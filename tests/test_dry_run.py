"""coverage and check_inputs: which layers a model really calls."""

from __future__ import annotations

import collections
import random
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


class Writing(nn.Module):
    """Counts, caches and draws in forward, as models with statistics, key-value caches and layer drop do."""

    def __init__(self, *, looks: bool, clips: bool = False) -> None:
        super().__init__()
        self.linear, self.looks, self.clips = nn.Linear(8, 8), looks, clips
        self.embedding = nn.Embedding(8, 8, max_norm=0.1)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.kept: list[Any] = []
        self.seen: dict[str, Any] = {"inner": []}

    def forward(self, x: torch.Tensor, cache: Any = None) -> torch.Tensor:
        self.calls += 1
        self.kept.append(x)
        self.seen["inner"].append(x)
        self.latest = x
        if cache is not None:
            cache.append(x)
        if random.random() > 2 or (torch.rand([]) > 2 if self.looks else False):
            return x
        if self.clips:
            self.linear.weight.clamp_(-0.01, 0.01)
            x.add_(1)
        if self.looks and not x.sum().isnan().item():
            x = x + self.embedding(torch.arange(8)).sum()
        self.norm.train()
        return self.norm(self.linear(x))


@pytest.mark.parametrize("clips", [False, True], ids=["", "clips"])
@pytest.mark.parametrize("looks", [False, True], ids=["faked", "for real"])
def test_the_run_changes_nothing(looks: bool, clips: bool) -> None:
    model = Writing(looks=looks, clips=clips)
    before = snapshot(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}, dict(vars(model))
    x, cache = torch.randn(5, 8), []
    given = x.clone()
    drawn, state = torch.get_rng_state(), random.getstate()
    seen = ll.coverage(model, x, cache=cache)
    assert seen.fired == ("linear",)
    ll.attach(model, ll.LoRAConfig(r=2), check_inputs={"x": x, "cache": cache})
    ll.detach(model)
    assert snapshot(model) == before[0]
    assert all(torch.equal(tensor, before[1][key]) for key, tensor in model.state_dict().items())
    assert vars(model).keys() == before[2].keys()
    assert (model.kept, model.seen, cache) == ([], {"inner": []}, [])
    assert torch.equal(x, given)
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("looks", [False, True], ids=["faked", "for real"])
def test_other_threads_see_nothing_of_the_run(looks: bool) -> None:
    """What the model is while a forward of the dry run is under way."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))

    class Watch:
        seen: list[Any] = []  # noqa: RUF012

        def look(self, *_: Any) -> None:
            hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model]
            self.seen.append(([m.training for m in model], hooks, [id(p) for p in model.parameters()]))
            if looks:
                torch.ones(1).item()

    watch = Watch()
    expected = [True, True], [0, 0], [id(p) for p in model.parameters()]
    model.register_forward_pre_hook(watch.look)
    ll.coverage(model, torch.randn(2, 4))
    assert watch.seen
    assert all(seen == expected for seen in watch.seen)


def test_a_mapping_is_a_batch_of_keyword_arguments() -> None:
    model = Odd()
    batch = collections.UserDict({"x": torch.randn(5, 8)})
    ll.attach(model, ll.LoRAConfig(r=2, target_names=("^used",)), check_inputs=batch)


def test_a_model_that_forbids_copies() -> None:
    class Sharded(nn.Sequential):
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("no deepcopy here")

    with pytest.raises(ll.ModelStateError, match="Sharded forbids the copy of its structure that a dry run needs"):
        ll.coverage(Sharded(nn.Linear(4, 4)), torch.randn(2, 4))
