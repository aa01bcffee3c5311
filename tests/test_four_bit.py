"""Packing that is forced on does what such a processor does: the tests under --packing=on speak of the real thing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import lora_lite as ll

bnb = pytest.importorskip("bitsandbytes")

from . import four_bit  # noqa: E402
from .test_packing import rearrange  # noqa: E402


@pytest.fixture(autouse=True)
def unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test forces is taken back."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", bnb.nn.modules.has_avx512bf16)
    monkeypatch.setattr(bnb.functional, "gemv_4bit", bnb.functional.gemv_4bit)


def layer(d_in: int = 64, d_out: int = 96, kind: str = "nf4", double: bool = False) -> Any:
    torch.manual_seed(0)
    made = bnb.nn.Linear4bit(d_in, d_out, quant_type=kind, compress_statistics=double)
    made.load_state_dict(torch.nn.Linear(d_in, d_out).state_dict())
    return made.to("cpu").eval()


def far(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_forced_packing_rearranges_at_the_first_evaluation(kind: str, double: bool) -> None:
    four_bit.force(False)
    plain, x = layer(kind=kind, double=double), torch.randn(5, 64)
    expected = plain(x).detach()
    assert not getattr(plain.weight.quant_state, "packing_format_for_cpu", False)
    four_bit.force(True)
    packing = layer(kind=kind, double=double)
    got = packing(x).detach()
    assert packing.weight.quant_state.packing_format_for_cpu
    assert 0 < far(got, expected) < 1e-2  # measured: 0.003, of a product in bfloat16


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="the kernel of AVX512-BF16 is not on this processor")
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_product_is_that_of_the_processor(kind: str) -> None:
    made, x = layer(128, 64, kind), torch.randn(7, 128)
    rearrange(made)
    state = made.weight.quant_state
    ours = four_bit.packed_product(x, made.weight, copy.copy(state))
    theirs = bnb.functional.gemv_4bit(x, made.weight, state=state)
    assert far(ours, theirs) < 1e-2


def test_a_size_that_cannot_be_rearranged_is_evaluated_after_prepare() -> None:
    """bitsandbytes' own evaluation of such a layer ends in an error of torch on these processors."""
    four_bit.force(True)
    model, x = torch.nn.Sequential(layer(96, 64)), torch.randn(3, 96)
    with pytest.raises(RuntimeError, match="is invalid for input of size"):
        copy.deepcopy(model)(x)
    ll.prepare(model)
    base = model(x)
    ll.attach(model, ll.PiSSAConfig(r=4))
    assert torch.equal(model(x), base)
