"""Quantised and special layers: the base stays as it is, the start is exact, a file knows its base again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite_core.layers.weight_sketch import SAME_STORAGE, sketch_distance

from .models import weights_hash
from .test_packing import FLAG, rearrange
from .test_variants import VARIANTS, config

bnb = pytest.importorskip("bitsandbytes")


def layer(kind: str, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Linear(64, 64, bias=bias)
    if kind == "int8":
        quantised: Any = bnb.nn.Linear8bitLt(64, 64, bias=bias, has_fp16_weights=False)
    else:
        quantised = bnb.nn.Linear4bit(64, 64, bias=bias, quant_type=kind)
    quantised.load_state_dict(plain.state_dict())
    quantised = quantised.to("cpu")
    return quantised.to(dtype)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("name", VARIANTS)
def test_identity_and_untouched_base(kind: str, name: str) -> None:
    model = nn.Sequential(layer(kind))
    x = torch.randn(5, 64, requires_grad=True)
    twin = copy.deepcopy(model)
    base = twin(x)
    before = weights_hash(model)
    data = [torch.randn(80, 64)] if name == "eva" else None
    adapter = ll.attach(model, config(name), calibration_data=data)
    got = model(x)
    if atol := ll.get_variant(name).identity_atol:
        torch.testing.assert_close(got, base, rtol=1e-4, atol=10 * atol)
    else:
        assert torch.equal(got, base)
    got.square().mean().backward()
    assert any(float(p.grad.abs().max()) > 0 for p in adapter.parameters())
    ll.detach(model)
    assert weights_hash(model) == before


def test_probing_leaves_no_note_on_a_fresh_layer() -> None:
    """bitsandbytes fixes its compute dtype at the first forward; a probe must not be that forward."""
    model, never = nn.Sequential(layer("nf4")), nn.Sequential(layer("nf4"))
    notes = {name: value for name, value in vars(model[0]).items() if name.startswith("compute")}
    ll.attach(model, ll.PiSSAConfig(r=4))
    ll.detach(model)
    assert {name: value for name, value in vars(model[0]).items() if name.startswith("compute")} == notes
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(model(x), never(x))


def test_an_earlier_adapter_does_not_change_how_a_layer_is_probed() -> None:
    fresh, used = layer("nf4", bias=False), nn.Sequential(layer("nf4", bias=False))
    ll.attach(used, ll.LoRAConfig(r=2, dtype="float64"))
    assert torch.equal(ll.sketch(fresh), ll.sketch(used[0]))
    assert torch.equal(ll.dense_weight(fresh), ll.dense_weight(used[0]))


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_quantised_base_is_known_again_whatever_its_other_tensors_are_in(kind: str) -> None:
    sketches = [ll.sketch(layer(kind, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    assert max(sketch_distance(sketches[0], other) for other in sketches[1:]) < 0.25 * SAME_STORAGE


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_from_quantised_to_dense(kind: str, tmp_path: Any) -> None:
    from .test_twins import int8_saturates

    if kind == "int8" and int8_saturates():
        pytest.skip("the int8 product of this oneDNN saturates")
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 64))
    model = nn.Sequential(layer(kind))
    ll.attach(model, ll.PiSSAConfig(r=4)).save(tmp_path / "a.safetensors")
    ll.load(nn.Sequential(layer(kind)), tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match=f"trained on bnb-{kind} weights and is opened on dense ones"):
        ll.load(dense, tmp_path / "a.safetensors")
    with pytest.raises(ll.BaseMismatch):
        ll.load(nn.Sequential(nn.Linear(64, 64)), tmp_path / "a.safetensors")


def start(name: str, model: nn.Module) -> dict[str, torch.Tensor]:
    data = [torch.randn(80, 64, generator=torch.Generator().manual_seed(0))] if name == "eva" else None
    return {
        key: tensor.detach() for key, tensor in ll.attach(model, config(name), calibration_data=data).named_tensors()
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_after_prepare_a_baseline_does_not_move_the_start(name: str) -> None:
    fresh, evaluated = nn.Sequential(layer("nf4")), nn.Sequential(layer("nf4"))
    setattr(evaluated[0], FLAG, True)  # as on a processor with AVX512-BF16
    ll.prepare(evaluated)
    evaluated.eval()(torch.randn(3, 64))
    ours, theirs = start(name, evaluated), start(name, fresh)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_without_prepare_a_baseline_moves_the_start_by_the_rounding_of_the_scales() -> None:
    """Singular vectors may turn by several percent where two singular values are close; the values cannot (Weyl)."""
    fresh, evaluated = nn.Sequential(layer("nf4")), nn.Sequential(layer("nf4"))
    rearrange(evaluated[0])
    ours, theirs = start("pissa", evaluated), start("pissa", fresh)
    before, after = ll.dense_weight(fresh[0]), ll.dense_weight(evaluated[0])
    torch.testing.assert_close(after, before, rtol=2**-8, atol=0)  # one rounding to bfloat16
    values = [torch.linalg.svdvals(part["0.lora_B0"] @ part["0.lora_A0"])[:4] for part in (ours, theirs)]
    moved = float((values[0] - values[1]).abs().max())
    assert 0 < moved <= float(torch.linalg.matrix_norm(after - before, 2)) + 1e-5
