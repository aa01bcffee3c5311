"""RoAd against the matrix of its pairs, and against the peft package."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll
from tests.oracles import D_IN, D_OUT, assert_parity, assert_same, filled, peft_twin


def matrix(theta: Tensor, alpha: Tensor, mode: int, g: int) -> Tensor:
    """R (d_out, d_out), entry by entry from the definition."""
    d_out, half = 2 * len(theta) // mode, g // 2
    R = torch.zeros(d_out, d_out, dtype=theta.dtype)
    cosine, sine = alpha * theta.cos(), alpha * theta.sin()
    for group in range(d_out // g):
        for j in range(half):
            one, two = group * g + j, group * g + half + j
            if mode == 1:
                at = [[group * half + j] * 2] * 2
            elif mode == 2:
                at = [[group * g + j] * 2, [group * g + half + j] * 2]
            else:
                at = [
                    [group * 2 * g + j, group * 2 * g + g + j],
                    [group * 2 * g + half + j, group * 2 * g + g + half + j],
                ]
            R[one, one], R[one, two] = cosine[at[0][0]], -sine[at[0][1]]
            R[two, one], R[two, two] = sine[at[1][1]], cosine[at[1][0]]
    return R


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", [1, 2, 4])
@pytest.mark.parametrize("g", [2, 8, 16])
def test_formula(mode: int, g: int, bias: bool) -> None:
    layer, x = filled(ll.RoAdConfig(mode=mode, group_size=g), bias=bias)
    theta, delta = (p.detach().clone().requires_grad_() for p in (layer.lora_theta, layer.lora_alpha))
    expected = F.linear(x, layer.weight, layer.bias) @ matrix(theta, 1 + delta, mode, g).T
    assert_same(layer, x, expected, {"lora_theta": theta, "lora_alpha": delta})


@pytest.mark.parametrize("mode", [1, 2, 4])
def test_counts_and_liveness(mode: int) -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    adapter = ll.attach(model, ll.RoAdConfig(mode=mode))
    assert sum(p.numel() for p in adapter.parameters()) == mode * D_OUT
    x = torch.randn(3, D_IN)
    model(x).square().sum().backward()
    assert float(model[0].lora_alpha.grad.abs().max()) > 0
    model(x)[:, 0].sum().backward()
    assert float(model[0].lora_theta.grad.abs().max()) > 0


def test_a_small_angle_is_not_lost() -> None:
    """c − 1 = −2 sin²(θ/2) keeps what cos θ − 1 would round away in float32."""
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    layer = model[0]
    ll.attach(model, ll.RoAdConfig())
    layer.lora_theta.data.fill_(1e-4)
    layer.weight.data = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]])
    change = ll.get_variant("road").forward(
        {
            "y": torch.tensor([[1e-9, 0.0]]),
            "params": {n: getattr(layer, n) for n in ("lora_theta", "lora_alpha")},
            "cfg": ll.RoAdConfig(),
        }
    )
    torch.testing.assert_close(change, torch.tensor([[1e-9, 1e-13]]), rtol=1e-5, atol=0)


def test_group_sizes() -> None:
    for d_out, expected in ((128, 64), (96, 48), (20, 20), (2, 2), (134, 2)):
        from lora_lite_ortho.road import _group

        assert _group(d_out, ll.RoAdConfig()) == expected
    for d_out, fields, message in (
        (7, {}, "0: RoAdConfig: d_out=7 is odd and cannot be paired; leave the layer out with exclude_names"),
        (12, {"group_size": 8}, "0: RoAdConfig(group_size=8) does not divide d_out=12; sizes that do: [2, 4, 6, 12]"),
    ):
        with pytest.raises(ll.ConfigError) as caught:
            ll.attach(nn.Sequential(nn.Linear(4, d_out)), ll.RoAdConfig(**fields))
        assert str(caught.value) == message
    with pytest.raises(ll.ConfigError, match=r"RoAdConfig\(mode=3\): the modes are 1, 2 and 4"):
        ll.RoAdConfig(mode=3)
    with pytest.raises(ll.ConfigError, match=r"RoAdConfig\(group_size=3\): outputs are paired"):
        ll.RoAdConfig(group_size=3)


@pytest.mark.parametrize("mode", [1, 2, 4])
def test_parity_with_peft(mode: int) -> None:
    peft = pytest.importorskip("peft")
    layer, x = filled(ll.RoAdConfig(mode=mode, group_size=8), torch.float32)
    theirs, inner = peft_twin(layer, peft.RoadConfig(variant=f"road_{mode}", group_size=8, target_modules=["0"]))
    theta, alpha = inner.road_theta["default"], inner.road_alpha["default"]
    theta.data, alpha.data = layer.lora_theta.data.clone(), 1 + layer.lora_alpha.data
    assert_parity(layer, x, theirs, [(layer.lora_theta, theta), (layer.lora_alpha, alpha)])
