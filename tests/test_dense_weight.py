"""dense_weight in forward: by the storage's own function, which is compared with probing once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite_core.layers import weight_reading
from lora_lite_core.layers.weight_reading import _probed as probed

from .test_twins import int8_saturates


def four_bit() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    return bnb.nn.Linear4bit(64, 48, quant_type="nf4").to("cpu")


def eight_bit() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(layer.weight.data, has_fp16_weights=False, requires_grad=False)
    return layer.to("cpu")


def torchao() -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 48))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model[0]


class Codes(nn.Linear):
    """A layer that stores its weight in a way of its own, and says how to read it; wrongly where `wrong`."""

    wrong = False

    def __init__(self) -> None:
        super().__init__(64, 48)
        self.weight = nn.Parameter((self.weight.data * 100).round().to(torch.int8), requires_grad=False)

    def dequantize(self) -> Tensor:
        return self.weight.float() / (50 if self.wrong else 100)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) / 100, self.bias)


class Wrong(Codes):
    wrong = True


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_reading, "_UNPACKS", {})


@pytest.mark.parametrize("make", [four_bit, eight_bit, torchao, Codes])
def test_it_is_what_probing_finds_and_runs_the_layer_once(make: Callable[[], Any]) -> None:
    if make is eight_bit and int8_saturates():
        pytest.skip("the int8 product of this oneDNN saturates")
    torch.manual_seed(0)
    layer, runs = make(), []
    expected = probed(layer)
    torch.testing.assert_close(ll.dense_weight(layer), expected, rtol=1e-4, atol=0.01 * float(expected.abs().max()))
    kind = type(layer)
    forward = kind.forward
    kind.forward = lambda self, *args: runs.append(1) or forward(self, *args)
    try:
        again = ll.dense_weight(layer)
    finally:
        kind.forward = forward
    assert not runs, "the layer was probed a second time"
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=0.01 * float(expected.abs().max()))


def test_what_says_something_else_is_not_believed() -> None:
    layer = Wrong()
    for _ in range(2):
        torch.testing.assert_close(ll.dense_weight(layer), layer.weight.float() / 100)


def test_a_variant_may_ask_in_forward(registered: Any) -> None:
    """HiRA, y = (W + W ⊙ B A) x, on a quantised base: as on the dense one, in forward and backward."""

    class Config(ll.LowRankConfig):
        variant = "hira_like"

    class Variant:
        @staticmethod
        @ll.hookimpl
        def param_specs(d_in: int, d_out: int, cfg: Any) -> dict[str, ll.ParamSpec]:
            return {"lora_A": ll.ParamSpec((cfg.r, d_in), "kaiming_uniform"), "lora_B": ll.ParamSpec((d_out, cfg.r))}

        @staticmethod
        @ll.hookimpl
        def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], layer: nn.Module) -> Tensor:
            A, B = (params[name].to(x.dtype) for name in ("lora_A", "lora_B"))
            return y + nn.functional.linear(x, ll.dense_weight(layer).to(x.dtype) * (B @ A)).to(y.dtype)

    Variant.Config = Config  # type: ignore[attr-defined]
    registered(Variant, name="hira_like")
    packed = nn.Sequential(four_bit())
    dense = nn.Sequential(nn.Linear(64, 48))
    dense[0].weight.data = ll.dense_weight(packed[0]).clone()
    dense[0].bias.data = packed[0].bias.data.float().clone()  # type: ignore[union-attr,operator]
    x, found = torch.randn(8, 64), []
    for model in (packed, dense):
        adapter = ll.attach(model, Config(r=2))
        torch.manual_seed(1)
        for parameter in adapter.parameters():
            parameter.data.add_(torch.randn_like(parameter))
        y = model(x)
        y.square().mean().backward()
        found.append([y.detach(), *(p.grad for p in adapter.parameters())])
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm() / other.norm()) < 0.02
