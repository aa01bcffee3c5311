"""LoKr against torch.kron, and against the peft package."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll
from tests.oracles import assert_parity, assert_same, filled, peft_twin

CASES: list[tuple[dict[str, Any], set[str]]] = [
    ({"r": 2, "alpha": 6.0}, {"w1", "w2_a", "w2_b"}),
    ({"r": 8}, {"w1", "w2"}),
    ({"r": 1, "decompose_both": True}, {"w1_a", "w1_b", "w2_a", "w2_b"}),
    ({"r": 4, "alpha": 2.0, "decompose_both": True}, {"w1", "w2"}),
    ({"r": 2, "decompose_factor": 2}, {"w1", "w2_a", "w2_b"}),
    ({"r": 1, "decompose_factor": 5}, {"w1", "w2_a", "w2_b"}),  # divides neither width
]


def kron(w1: Tensor, w2: Tensor) -> Tensor:
    return torch.cat([torch.cat([one * w2 for one in row], dim=1) for row in w1])


@pytest.mark.parametrize(
    ("fields", "parts"), CASES, ids=lambda value: str(sorted(value) if isinstance(value, set) else value)
)
def test_formula(fields: dict[str, Any], parts: set[str]) -> None:
    layer, x = filled(ll.LoKrConfig(**fields))
    assert {name[5:] for name, _ in layer.named_parameters() if name.startswith("lora_")} == parts
    p = {name: getattr(layer, f"lora_{name}").detach().clone().requires_grad_() for name in sorted(parts)}
    w1 = p["w1"] if "w1" in p else p["w1_a"] @ p["w1_b"]
    w2 = p["w2"] if "w2" in p else p["w2_a"] @ p["w2_b"]
    scale = fields.get("alpha", fields["r"]) / fields["r"]
    expected = F.linear(x, layer.weight + scale * kron(w1, w2), layer.bias)
    assert_same(layer, x, expected, {f"lora_{name}": value for name, value in p.items()}, 1e-11)


@pytest.mark.parametrize(
    ("sizes", "factor", "shapes"),
    [
        ((7, 12), -1, ((3, 1), (4, 7))),  # 7 is prime
        ((128, 16), 4, ((4, 4), (4, 32))),
        ((256, 127), -1, ((1, 16), (127, 16))),
        ((12, 8), 3, ((2, 3), (4, 4))),  # of 8 the nearest below
    ],
)
def test_the_split(sizes: tuple[int, int], factor: int, shapes: Any) -> None:
    layer = nn.Linear(*sizes)
    ll.attach(nn.Sequential(layer), ll.LoKrConfig(r=100, decompose_factor=factor))
    assert (tuple(layer.lora_w1.shape), tuple(layer.lora_w2.shape)) == shapes
    assert not layer.lora_w2.any()
    assert layer.lora_w1.all()


@pytest.mark.parametrize(
    ("fields", "parts"), CASES, ids=lambda value: str(sorted(value) if isinstance(value, set) else value)
)
def test_parity_with_peft(fields: dict[str, Any], parts: set[str]) -> None:
    peft = pytest.importorskip("peft")
    layer, x = filled(ll.LoKrConfig(**fields), torch.float32)
    theirs, inner = peft_twin(layer, peft.LoKrConfig(**{"alpha": fields["r"], **fields}, target_modules=["0"]))
    pairs = [(getattr(layer, f"lora_{name}"), getattr(inner, f"lokr_{name}")["default"]) for name in sorted(parts)]
    for ours, table in pairs:
        table.data.copy_(ours.data)
    assert_parity(layer, x, theirs, pairs)


def test_tokens() -> None:
    model = nn.Sequential(nn.Embedding(12, 10))
    adapter = ll.attach(model, ll.LoKrConfig(r=8, target_names=("0",)))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    ids = torch.tensor([[0, 7], [11, 3]])
    change = kron(model[0].lora_w1, model[0].lora_w2)
    torch.testing.assert_close(model(ids), (model[0].weight + change.T)[ids])


def test_factors_that_are_none() -> None:
    for wrong in (0, -2, 2.0):
        with pytest.raises(ll.ConfigError, match=rf"decompose_factor={wrong}\): .*a whole number"):
            ll.LoKrConfig(decompose_factor=wrong)  # type: ignore[arg-type]


def test_a_split_that_is_none() -> None:
    with pytest.raises(ll.ConfigError, match=r"split='rows'\): give one of 'patches', 'channels', 'swapped'"):
        ll.LoKrConfig(split="rows")


CONVOLUTIONS: dict[str, Any] = {
    "1d": lambda: (nn.Conv1d(4, 6, 3, stride=2, padding=1), torch.randn(2, 4, 9)),
    "2d": lambda: (nn.Conv2d(4, 6, (3, 2), dilation=2), torch.randn(2, 4, 9, 8)),
    "3d": lambda: (nn.Conv3d(4, 6, 2), torch.randn(2, 4, 3, 4, 5)),
    "linear": lambda: (nn.Linear(4, 6), torch.randn(2, 4)),
}


@pytest.mark.parametrize("split", ["channels", "swapped"])
@pytest.mark.parametrize("r", [1, 8])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_splits_of_channels(kind: str, r: int, split: str) -> None:
    """Every place of the kernel is a Kronecker product of channels."""
    torch.manual_seed(0)
    layer, x = (one.double() for one in CONVOLUTIONS[kind]())
    frozen = layer.weight.detach().clone()
    adapter = ll.attach(nn.Sequential(layer), ll.LoKrConfig(r=r, alpha=3.0, split=split, target_names=("0",)))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    p = {name: tensor.detach().clone().requires_grad_() for name, tensor in adapter.layers()["0"].params.items()}
    w2 = p["lora_w2"] if r == 8 else p["lora_w2_a"] @ p["lora_w2_b"]
    places = w2.unflatten(1, (2, -1)).unbind(-1)
    pairs = [(p["lora_w1"], place) if split == "channels" else (place, p["lora_w1"]) for place in places]
    change = 3.0 / r * torch.stack([kron(*pair) for pair in pairs], -1).view_as(frozen)
    x.requires_grad_()
    plain, _ = CONVOLUTIONS[kind]()
    plain = plain.double().requires_grad_(False)
    expected = torch.func.functional_call(plain, {"weight": frozen + change, "bias": layer.bias.detach()}, x)
    assert_same(layer, x, expected, p, 1e-10)
