"""Several adapters as a new one: equal to the weighted sum of their changes in float64, and PEFT's other rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite_core.attached.records import targets_of
from lora_lite_core.weights.probing import adapted_map

from .models import net, token_ids
from .test_switching import out, put

LOW_RANK = ("lora", "pissa", "eva", "lora_xs", "hra", "delora", "ssvd", "antipasto")


def change(model: nn.Module, name: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path, target in targets_of(model, name).items():
        made = adapted_map(path, target.layer, [target], inactive=True)
        found[path] = made.weight - made.base_weight
    return found


@pytest.mark.parametrize("other", LOW_RANK)
def test_an_exact_sum(other: str) -> None:
    model = net(torch.float64)
    put(model, "lora", "a", r=3, target_names=("q_proj", "up_proj"))
    put(model, other, "b", seed=3)
    ll.activate(model, "a")  # the other one is not active, and counts
    made = ll.combine(model, {"a": 0.7, "b": -0.3}, name="c")
    a, b, c = (change(model, name) for name in "abc")
    assert c.keys() == a.keys() | b.keys()
    for path, delta in c.items():
        expected = 0.7 * a.get(path, torch.zeros(())) - 0.3 * b.get(path, torch.zeros(()))
        torch.testing.assert_close(delta, expected.expand_as(delta), rtol=0, atol=3e-7 * float(expected.abs().max()))
    assert max(made.errors.values()) < 2e-7
    assert ll.adapters(model)["c"].record.variant.name == "lora"
    ll.activate(model, "c")
    assert isinstance(out(model), Tensor)


def test_strengths_count_and_all_of_it_can_be_combined_again() -> None:
    model = net(torch.float64)
    put(model, "lora", "a"), put(model, "lora", "b", seed=3)
    ll.set_strength(model, {"a": 0.5})
    ll.combine(model, {"a": 1, "b": 1}, name="c")
    a, b, c = (change(model, name) for name in "abc")
    for path in c:
        torch.testing.assert_close(c[path], a[path] + b[path], rtol=0, atol=1e-7)
    ll.detach(model, "a")
    ll.combine(model, {"c": 1, "b": -1}, name="a2", rank=4)
    ll.activate(model, "a2")
    assert model(token_ids()).isfinite().all()


def test_a_truncated_sum_says_what_it_has_lost() -> None:
    model = net(torch.float64)
    put(model, "lora", "a"), put(model, "lora", "b", seed=3)
    made = ll.combine(model, {"a": 1.0, "b": 1.0}, name="c", rank=2)
    a, b, c = (change(model, name) for name in "abc")
    for path, delta in c.items():
        whole = a[path] + b[path]
        U, S, Vh = torch.linalg.svd(whole)
        best = (U[:, :2] * S[:2]) @ Vh[:2]
        torch.testing.assert_close(delta, best, rtol=0, atol=1e-6)
        assert made.errors[path] == pytest.approx(float((whole - best).norm() / whole.norm()), rel=1e-3)
        assert made.layers[path].needed == 8


@pytest.mark.filterwarnings("ignore:The density 1.0")  # of peft
@pytest.mark.parametrize("method", ["ties", "dare", "dare_ties", "magnitude_prune"])
def test_other_rules_as_peft_has_them(method: str) -> None:
    """The same sums of the same ΔW by PEFT's own functions; its draws are its own, so dare is compared at density 1."""
    merges = pytest.importorskip("peft.utils.merge_utils")
    model: Any = net(torch.float64)
    for number, name in enumerate("abx"):
        put(model, "lora", name, seed=number)
    density, weights = (1.0 if "dare" in method else 0.4), torch.tensor([0.7, -0.5, 0.4], dtype=torch.float64)
    ll.combine(
        model, dict(zip("abx", weights.tolist(), strict=True)), name="c", rank=24, method=method, density=density
    )
    each = [change(model, name) for name in "abx"]
    by_name = {"dare": "dare_linear"}.get(method, method)
    for path, delta in change(model, "c").items():
        expected = getattr(merges, by_name)([one[path] for one in each], weights, density)
        torch.testing.assert_close(delta, expected, rtol=0, atol=3e-6)


def test_dare_drops_at_random_and_keeps_the_mean() -> None:
    model = net(torch.float64)
    put(model, "lora", "a")
    ll.combine(model, {"a": 1.0}, name="c", rank=24, method="dare", density=0.5, seed=1)
    ll.combine(model, {"a": 1.0}, name="d", rank=24, method="dare", density=0.5, seed=1)
    a, c, d = (change(model, name) for name in "acd")
    for path in a:
        assert torch.equal(c[path], d[path])
        ratio = c[path] / a[path]
        kept = ratio.abs() > 1e-3
        assert 0.3 < float(kept.double().mean()) < 0.7
        torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 2.0), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"weights": {}}, ll.ConfigError, r"weights={}: give a finite number for each adapter"),
        ({"weights": {"a": float("inf")}}, ll.ConfigError, r"give a finite number for each adapter"),
        ({"weights": {"z": 1.0}}, ll.AdapterNameError, r"no adapter is called 'z'"),
        ({"name": "a"}, ll.AdapterNameError, r"an adapter called 'a' is attached already"),
        ({"method": "tize"}, ll.ConfigError, r"method='tize'; the methods are exact, magnitude_prune, dare, ties"),
        ({"rank": 0}, ll.ConfigError, r"rank=0: a rank is a whole number from 1"),
        ({"density": 0.0}, ll.ConfigError, r"density=0.0: the share"),
        ({"weights": {"shift": 1.0}}, ll.MergeError, r"'shift' shifts the bias of layers"),
    ],
)
def test_mistakes(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    model = net()
    put(model, "lora", "a")
    put(model, "ia3", "shift", target_names=("v_proj",))
    model.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.data.normal_()
    before = out(model)
    with pytest.raises(error, match=text):
        ll.combine(model, **{"weights": {"a": 1.0}, "name": "c", **arguments})
    assert list(ll.adapters(model)) == ["a", "shift"]
    assert torch.equal(out(model), before)


def test_without_the_package_of_what_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    put(model, "hra", "a")
    monkeypatch.setenv("LORA_LITE_BLOCK", "lora")
    with pytest.raises(ll.UnknownVariant, match="variant 'lora' of lora-lite-lora is blocked by LORA_LITE_BLOCK=lora"):
        ll.combine(model, {"a": 1.0}, name="b")
    assert list(ll.adapters(model)) == ["a"]
