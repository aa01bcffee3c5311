"""The rearranged 4-bit layers of AVX512-BF16 processors, with bitsandbytes' own functions, on any processor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lora_lite as ll

bnb = pytest.importorskip("bitsandbytes")
FLAG = "support_avx512bf16_for_cpu"


def quantised(nested: bool = False, flag: bool = True) -> Any:
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(64, 96, quant_type="nf4", compress_statistics=nested)
    layer.load_state_dict(nn.Linear(64, 96).state_dict())
    layer = layer.to("cpu")
    setattr(layer, FLAG, flag)
    return nn.Sequential(layer)


def rearrange(layer: Any) -> None:
    """What an evaluation does to the layer on such a processor."""
    layer.weight.data, layer.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )


def dense(layer: Any) -> torch.Tensor:
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


@pytest.mark.parametrize("nested", [False, True])
def test_an_evaluated_baseline_is_put_back(nested: bool) -> None:
    model, fresh = quantised(nested), quantised(nested)
    codes = fresh[0].weight.data.clone()
    expected = dense(fresh[0])
    rearrange(model[0])
    adapter = ll.attach(model, ll.LoRAConfig(r=4))
    assert torch.equal(model[0].weight.data, codes)
    torch.testing.assert_close(dense(model[0]), expected, rtol=2**-8, atol=0)
    twin = nn.Sequential(nn.Linear(64, 96))
    twin.load_state_dict({"0.weight": dense(model[0]), "0.bias": model[0].bias.data})
    other = ll.attach(twin, ll.LoRAConfig(r=4))
    x = torch.randn(5, 64)
    for one in (model, twin):
        optimizer = torch.optim.AdamW(ll.adapters(one)["default"].parameters(), lr=1e-2)
        for _ in range(5):
            one(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for (_, ours), (_, theirs) in zip(adapter.named_tensors(), other.named_tensors(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-3)


def test_adapted_layers_do_not_rearrange_and_the_flag_comes_back() -> None:
    model = quantised()
    model.append(nn.Linear(96, 8))
    codes = model[0].weight.data.clone()
    ll.attach(model, ll.PiSSAConfig(r=4, target_names=("1",)))  # the 4-bit layer is no target
    assert getattr(model[0], FLAG) is False
    model.eval()(torch.randn(2, 64))
    assert torch.equal(model[0].weight.data, codes)
    ll.detach(model)
    assert getattr(model[0], FLAG) is True


def test_probing_does_not_rearrange() -> None:
    model = quantised().eval()
    codes = model[0].weight.data.clone()
    ll.attach(model, ll.PiSSAConfig(r=4))
    assert torch.equal(model[0].weight.data, codes)


def test_a_failed_attach_gives_the_flag_back() -> None:
    model = quantised()
    with pytest.raises(ll.TargetError):
        ll.attach(model, ll.PiSSAConfig(r=65))
    assert getattr(model[0], FLAG) is True


def test_prepare_is_for_good() -> None:
    model = quantised()
    assert ll.prepare(model) == 1
    assert ll.prepare(model) == 0
    ll.attach(model, ll.LoRAConfig(r=4)).detach()
    assert getattr(model[0], FLAG) is False


def test_what_cannot_be_put_back_is_refused() -> None:
    model = quantised()
    rearrange(model[0])
    model[0].weight.quant_state.original_qshape = (7,)
    with pytest.raises(
        ll.ModelStateError, match=r"0 \(bitsandbytes 4-bit\) was rearranged .* call ll.prepare\(model\) before"
    ):
        ll.attach(model, ll.LoRAConfig(r=4))
    assert not ll.adapters(model)
