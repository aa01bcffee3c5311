"""SHiRA and Super-Tuning, which train entries of the weight, against a dense change and the peft package."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll
from tests.oracles import D_IN, D_OUT, assert_parity, assert_same, filled, peft_twin

CONFIGS: dict[str, Any] = {
    "SHiRA": lambda: ll.SHiRAConfig(r=3),
    "Super-Tuning": lambda: ll.SupertuningConfig(sparsity=0.9),
    "smallest": lambda: ll.SupertuningConfig(sparsity=0.9, smallest=True),
}


def dense(layer: Any, values: Tensor) -> Tensor:
    """The entries one by one."""
    change = torch.zeros(D_OUT, D_IN, dtype=values.dtype)
    for value, place in zip(values, layer.lora_places.tolist(), strict=True):
        one = torch.zeros_like(change)
        one[place // D_IN, place % D_IN] = 1
        change = change + value * one
    return change


@pytest.mark.parametrize("name", CONFIGS)
def test_formula(name: str) -> None:
    layer, x = filled(CONFIGS[name]())
    values = layer.lora_values.detach().clone().requires_grad_()
    expected = F.linear(x, layer.weight + dense(layer, values), layer.bias)
    assert_same(layer, x, expected, {"lora_values": values})


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (6.0, 2.0)])
def test_a_product_beside_the_entries(alpha: float | None, scale: float) -> None:
    layer, x = filled(ll.SupertuningConfig(sparsity=0.9, r=3, alpha=alpha))
    names = ("lora_values", "lora_A", "lora_B")
    values, A, B = (getattr(layer, name).detach().clone().requires_grad_() for name in names)
    expected = F.linear(x, layer.weight + dense(layer, values) + scale * B @ A, layer.bias)
    assert_same(layer, x, expected, dict(zip(names, (values, A, B), strict=True)))


@pytest.mark.parametrize("r", [1, 9])  # by a few draws, and by an order of all entries
def test_random_places(r: int) -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT), nn.Linear(D_OUT, D_IN))
    ll.attach(model, ll.SHiRAConfig(r=r))
    places = [layer.lora_places.tolist() for layer in model]
    for one in places:
        assert len({*one}) == r * (D_IN + D_OUT)
        assert min(one) >= 0
        assert max(one) < D_IN * D_OUT
    assert places[0] != places[1]
    other = nn.Sequential(nn.Linear(D_IN, D_OUT), nn.Linear(D_OUT, D_IN))
    ll.attach(other, ll.SHiRAConfig(r=r), seed=1)
    assert other[0].lora_places.tolist() != places[0]


def test_every_entry_is_as_likely() -> None:
    hits = torch.zeros(64)
    for seed in range(100):
        layer = nn.Linear(8, 8)
        ll.attach(nn.Sequential(layer), ll.SHiRAConfig(r=1), seed=seed)
        hits[layer.lora_places] += 1
    assert int(hits.sum()) == 100 * 16
    assert float((hits - 25).abs().max()) < 5 * (100 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize("smallest", [False, True])
def test_the_largest_entries(smallest: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(D_IN, D_OUT)
    ll.attach(nn.Sequential(layer), ll.SupertuningConfig(sparsity=0.9, smallest=smallest))
    sizes = layer.weight.detach().abs().flatten()
    chosen = torch.zeros(len(sizes), dtype=torch.bool).index_fill(0, layer.lora_places, True)
    assert int(chosen.sum()) == 38
    if smallest:
        assert float(sizes[chosen].max()) < float(sizes[~chosen].min())
    else:
        assert float(sizes[chosen].min()) > float(sizes[~chosen].max())


def test_a_file_of_another_base(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    ll.attach(model, ll.SupertuningConfig(sparsity=0.9))
    ll.save(model, tmp_path / "one.safetensors")
    with pytest.raises(ll.BaseMismatch):
        ll.load(nn.Sequential(nn.Linear(D_IN, D_OUT)), tmp_path / "one.safetensors")


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # peft's own
@pytest.mark.parametrize("name", CONFIGS)
def test_parity_with_peft(name: str) -> None:
    peft = pytest.importorskip("peft")
    layer, x = filled(CONFIGS[name](), torch.float32)
    if name == "SHiRA":
        theirs, inner = peft_twin(layer, peft.ShiraConfig(r=3, target_modules=["0"]))
        rows, columns = layer.lora_places // D_IN, layer.lora_places % D_IN
        inner.shira_indices["default"] = torch.stack([rows, columns]).int()
        values = inner.shira_weight["default"]
    else:
        config = peft.SupertuningConfig(sparsity=0.9, select_top=name != "smallest", target_modules=["0"])
        theirs, inner = peft_twin(layer, config)
        indices = inner.supertuning_indices["default"]
        assert sorted(indices.tolist()) == layer.lora_places.tolist()
        inner.supertuning_indices["default"] = layer.lora_places.int()
        values = inner.supertuning_values["default"]
    values.data.copy_(layer.lora_values.data)
    assert_parity(layer, x, theirs, [(layer.lora_values, values)])


def test_more_entries_than_peft_counts() -> None:
    layer = nn.Linear(D_IN, D_OUT)
    params = {"lora_places": torch.tensor([5, 2**31]), "lora_values": torch.zeros(2)}
    to_peft = ll.get_variant("supertuning").to_peft
    with pytest.raises(ll.MergeError, match="counts entries with 32 bits, and the layer has more"):
        to_peft({"params": params, "cfg": ll.SupertuningConfig(), "layer": layer})


def test_refusals() -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    with pytest.raises(ll.TargetError, match=r"SHiRAConfig\(r=10\) on a layer 24 → 16: 400 .* of 384; r is at most 9"):
        ll.attach(model, ll.SHiRAConfig(r=10))
    with pytest.raises(ll.TargetError, match=r"leaves no entry to train; sparsity is at most 0\.99739"):
        ll.attach(model, ll.SupertuningConfig(sparsity=0.999))
    with pytest.raises(ll.ConfigError, match=r"SupertuningConfig\(sparsity=1\): a share from 0 to below 1"):
        ll.SupertuningConfig(sparsity=1)
    with pytest.raises(
        ll.ConfigError, match=r"SupertuningConfig\(r=-1, alpha=None\): r from 0, alpha above 0 beside it"
    ):
        ll.SupertuningConfig(r=-1)
    for r, alpha in ((0, 4.0), (4, 0.0)):
        with pytest.raises(ll.ConfigError, match=rf"SupertuningConfig\(r={r}, alpha={alpha}\): r from 0, alpha above"):
            ll.SupertuningConfig(r=r, alpha=alpha)
