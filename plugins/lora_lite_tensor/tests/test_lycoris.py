"""LoHa and LoKr against the LyCORIS package itself: the same tensors, equal outputs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll

pytest.importorskip("lycoris", reason="the authors' package, pip install lycoris-lora, is in the dev group alone")
from lycoris.functional.general import factorization
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule

LOHA = {"lora_A1": "hada_w1_b", "lora_B1": "hada_w1_a", "lora_A2": "hada_w2_b", "lora_B2": "hada_w2_a"}
LOKR = {f"lora_{part}": f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")}
LINEAR: dict[str, Any] = {"24 → 16": (24, 16), "16 → 24": (16, 24), "7 → 12": (7, 12), "36 → 36": (36, 36)}
CONV: dict[str, Any] = {
    "3 × 3": {"kernel_size": 3, "padding": 1},
    "3 × 2, strided": {"kernel_size": (3, 2), "stride": 2, "dilation": 2},
    "1 × 1": {"kernel_size": 1},
}


def compared(layer: Any, cfg: ll.AdapterConfig, theirs: Any, names: dict[str, str], x: Tensor) -> set[str]:
    """Attaches ours, gives both the same random tensors, and compares; returns which tensors there are."""
    adapter = ll.attach(nn.Sequential(layer), cfg)
    theirs = theirs.to(x.dtype)
    ours = {name: tensor for name, tensor in adapter.layers()["0"].params.items() if tensor.requires_grad}
    others = {name: theirs.get_parameter(other) for name, other in names.items() if hasattr(theirs, other)}
    assert ours.keys() == others.keys()
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == sum(p.numel() for p in ours.values())
    for name, tensor in ours.items():
        nn.init.normal_(tensor)
        others[name].data = tensor.detach().clone().view_as(others[name])
    got, expected = layer(x), theirs(x)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, [x, *ours.values()], direction),
        torch.autograd.grad(expected, [x, *(others[name] for name in ours)], direction),
        strict=True,
    ):
        torch.testing.assert_close(a, b.view_as(a), rtol=1e-9, atol=1e-9)
    return {name.removeprefix("lora_") for name in ours}


def linear(sizes: tuple[int, int]) -> tuple[Any, Any, Tensor]:
    """A layer, another with its weight, and an input."""
    torch.manual_seed(0)
    layer, twin = (nn.Linear(*sizes, dtype=torch.float64) for _ in range(2))
    twin.load_state_dict(layer.state_dict())
    return layer, twin, torch.randn(5, sizes[0], dtype=torch.float64, requires_grad=True)


def convolution(fields: dict[str, Any]) -> tuple[Any, Any, Tensor]:
    torch.manual_seed(0)
    layer, twin = (nn.Conv2d(8, 12, **fields, dtype=torch.float64) for _ in range(2))
    twin.load_state_dict(layer.state_dict())
    return layer, twin, torch.randn(2, 8, 9, 10, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("r", [1, 3, 9])
@pytest.mark.parametrize("size", LINEAR)
def test_loha(size: str, r: int) -> None:
    layer, twin, x = linear(LINEAR[size])
    compared(layer, ll.LoHaConfig(r=r, alpha=2.5), LohaModule("one", twin, lora_dim=r, alpha=2.5), LOHA, x)


@pytest.mark.parametrize("kernel", CONV)
def test_loha_on_a_convolution(kernel: str) -> None:
    layer, twin, x = convolution(CONV[kernel])
    compared(
        layer,
        ll.LoHaConfig(r=2, alpha=3.0, target_names=("0",)),
        LohaModule("one", twin, lora_dim=2, alpha=3.0),
        LOHA,
        x,
    )


def test_lohas_start() -> None:
    """The deviations of all four factors."""
    torch.manual_seed(0)
    theirs = LohaModule("one", nn.Linear(400, 300), lora_dim=8)
    layer = nn.Linear(400, 300)
    ll.attach(nn.Sequential(layer), ll.LoHaConfig(r=8))
    for ours, other in LOHA.items():
        std = float(getattr(theirs, other).detach().std())
        assert float(getattr(layer, ours).detach().std()) == pytest.approx(std, rel=0.1)


LOKR_CASES: list[tuple[str, dict[str, Any], set[str]]] = [
    ("36 → 36", {"r": 2, "alpha": 5.0}, {"w1", "w2_a", "w2_b"}),
    ("36 → 36", {"r": 2, "alpha": 5.0, "decompose_both": True}, {"w1_a", "w1_b", "w2_a", "w2_b"}),
    ("24 → 16", {"r": 1, "alpha": 0.5, "decompose_factor": 2}, {"w1", "w2_a", "w2_b"}),
    ("16 → 24", {"r": 2, "alpha": 3.0, "decompose_factor": 4}, {"w1", "w2_a", "w2_b"}),
    ("16 → 24", {"r": 1, "alpha": 3.0, "decompose_factor": 5, "decompose_both": True}, {"w1_a", "w1_b", "w2_a", "w2_b"}),
    ("7 → 12", {"r": 3, "alpha": 2.0}, {"w1", "w2_a", "w2_b"}),
    ("24 → 16", {"r": 3}, {"w1", "w2"}),  # whole at half of the larger side
    ("24 → 16", {"r": 50, "decompose_both": True}, {"w1", "w2"}),
]  # fmt: skip


def readable(value: Any) -> str:
    """A test's name; sets have no order of their own."""
    return str(sorted(value) if isinstance(value, set) else value)


def lokr(twin: Any, fields: dict[str, Any]) -> Any:
    """LyCORIS' module of these fields."""
    renamed = {{"r": "lora_dim", "decompose_factor": "factor"}.get(name, name): v for name, v in fields.items()}
    return LokrModule("one", twin, **{"alpha": fields["r"], **renamed})


@pytest.mark.parametrize(("size", "fields", "parts"), LOKR_CASES, ids=readable)
def test_lokr(size: str, fields: dict[str, Any], parts: set[str]) -> None:
    layer, twin, x = linear(LINEAR[size])
    assert compared(layer, ll.LoKrConfig(**fields), lokr(twin, fields), LOKR, x) == parts


@pytest.mark.parametrize(
    ("fields", "parts"), [({"r": 1, "alpha": 3.0}, {"w1", "w2_a", "w2_b"}), ({"r": 99}, {"w1", "w2"})], ids=readable
)
@pytest.mark.parametrize("kernel", CONV)
@pytest.mark.parametrize(("split", "factor"), [("channels", 2), ("channels", -1), ("patches", 2)])
def test_lokr_on_a_convolution(kernel: str, split: str, factor: int, fields: dict[str, Any], parts: set[str]) -> None:
    """Channels are split, and w2 is one of kernels; a product of rank 1 of a whole patch with a factor of 2, too."""
    layer, twin, x = convolution(CONV[kernel])
    fields = {**fields, "decompose_factor": factor}
    cfg = ll.LoKrConfig(**fields, split=split, target_names=("0",))
    assert compared(layer, cfg, lokr(twin, fields), LOKR, x) == parts


def test_every_split_is_theirs_up_to_its_order() -> None:
    from lora_lite_tensor._widths import pair

    for width in (*range(1, 130), 768, 1000, 1024, 11008):
        for factor in (-1, 1, 2, 3, 4, 5, 8, 16, 100):
            assert sorted(pair(width, factor)) == sorted(factorization(width, factor)), (width, factor)


def test_the_scale_of_two_whole_parts_stays() -> None:
    """alpha / r, as in the peft package; LyCORIS leaves it out then."""
    layer, twin, x = linear((24, 16))
    ll.attach(nn.Sequential(layer), ll.LoKrConfig(r=50, alpha=100.0))
    theirs = lokr(twin, {"r": 50, "alpha": 100.0}).double()
    for name in ("w1", "w2"):
        nn.init.normal_(getattr(layer, f"lora_{name}"))
        getattr(theirs, f"lokr_{name}").data.copy_(getattr(layer, f"lora_{name}").data)
    torch.testing.assert_close(layer(x) - twin(x), 2 * (theirs(x) - twin(x)))


def test_a_factor_beyond_the_root_is_the_size_of_w1() -> None:
    """As in the peft package; in LyCORIS w1 gets the smaller part."""
    layer, twin, _ = linear((24, 16))
    fields = {"r": 50, "decompose_factor": 8}
    ll.attach(nn.Sequential(layer), ll.LoKrConfig(**fields))
    theirs = lokr(twin, fields)
    assert (tuple(layer.lora_w1.shape), tuple(layer.lora_w2.shape)) == ((8, 8), (2, 3))
    assert (tuple(theirs.lokr_w1.shape), tuple(theirs.lokr_w2.shape)) == ((2, 3), (8, 8))
