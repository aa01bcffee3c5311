"""Base layers: sizes, frozen forward, dense weight, sketch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite_core.layers.kinds import layer_sizes, storage_of
from lora_lite_core.layers.weight_sketch import ACROSS_STORAGES, SAME_STORAGE, sketch_distance

from .measure_sketch import measure


class Conv1D(nn.Module):
    """As Hugging Face's of GPT-2: transposed weight, nx/nf instead of in_features/out_features."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x.view(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


class Subclass(nn.Linear):
    pass


def layers(dtype: torch.dtype) -> list[tuple[nn.Module, torch.Tensor]]:
    """Each with its true weight, (d_out, d_in)."""
    torch.manual_seed(0)
    made = [nn.Linear(300, 7), nn.Linear(300, 7, bias=False), Subclass(300, 7), Conv1D(7, 300)]
    made = [layer.to(dtype) for layer in made]
    return [(m, m.weight.T if isinstance(m, Conv1D) else m.weight) for m in made]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dense_weight_is_exact(dtype: torch.dtype) -> None:
    for layer, weight in layers(dtype):
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        objects = dict(layer.named_parameters())
        dense = ll.dense_weight(layer)
        assert dense.shape == (7, 300)
        assert torch.equal(dense, weight)
        assert not dense.requires_grad
        assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
        assert all(parameter is objects[name] for name, parameter in layer.named_parameters())


def test_parametrised_layers_are_probed() -> None:
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(20, 7))
    torch.testing.assert_close(ll.dense_weight(layer), layer.weight, rtol=0, atol=1e-7)


def test_base_forward_runs_no_hook() -> None:
    layer = nn.Linear(4, 3)
    layer.register_forward_hook(lambda *_: torch.zeros(1))
    x = torch.randn(2, 4)
    assert torch.equal(ll.base_forward(layer, x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize(
    ("layer", "sizes"),
    [
        (nn.Linear(3, 5), (3, 5)),
        (Conv1D(5, 3), (3, 5)),
        (nn.Conv1d(3, 5, 1), None),
        (nn.Embedding(3, 5), None),
        (nn.Bilinear(3, 3, 5), None),
        (nn.LayerNorm(3), None),
        (nn.Sequential(nn.Linear(3, 5)), None),
    ],
)
def test_sizes(layer: nn.Module, sizes: Any) -> None:
    assert layer_sizes(layer) == sizes


def test_conv1d_of_transformers() -> None:
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(5, 3)
    assert layer_sizes(conv) == (3, 5)
    assert torch.equal(ll.dense_weight(conv), conv.weight.T)
    assert storage_of(conv) == "dense"


def test_adapters_on_conv1d_equal_those_on_the_linear_twin() -> None:
    conv = Conv1D(6, 8)
    twin = nn.Linear(8, 6)
    twin.weight.data, twin.bias.data = conv.weight.data.T.clone(), conv.bias.data.clone()
    models = nn.Sequential(conv), nn.Sequential(twin)
    x = torch.randn(3, 8)
    for cfg in (ll.LoRAConfig(r=2), ll.PiSSAConfig(r=2), ll.IA3Config(), ll.IA3FFConfig()):
        adapters = [ll.attach(model, cfg) for model in models]
        for (_, a), (_, b) in zip(*(adapter.named_tensors() for adapter in adapters), strict=True):
            torch.testing.assert_close(a, b)
            a.data.add_(0.1)
            b.data.add_(0.1)
        torch.testing.assert_close(models[0](x), models[1](x))
        for model in models:
            ll.detach(model)


def test_sketch_of_probed_and_plain_layers_agree() -> None:
    for dtype, allowed in ((torch.float32, 1e-5), (torch.bfloat16, SAME_STORAGE)):
        plain, _, subclass, _ = (layer for layer, _ in layers(dtype))
        subclass.load_state_dict(plain.state_dict())
        assert sketch_distance(ll.sketch(plain), ll.sketch(subclass)) < allowed


def test_sketch_ends_with_the_rms() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(512, 256)
    assert ll.sketch(layer).shape == (17,)
    rms = float(layer.weight.detach().square().mean().sqrt())
    assert abs(float(ll.sketch(layer)[-1]) / rms - 1) < 0.1


def test_sketch_distances_keep_clear_of_the_tolerances() -> None:
    found = measure(layers=20)
    assert max(found["bfloat16"]) < SAME_STORAGE < min(found["1 % noise"])
    assert max(found["float16"]) < SAME_STORAGE
    assert min(found["another seed"]) > 2 * max(ACROSS_STORAGES.values())
    assert min(found["rows permuted"]) > 2 * max(ACROSS_STORAGES.values())
    assert min(found["sign"]) > 2 * max(ACROSS_STORAGES.values())


def test_sketches_that_do_not_compare() -> None:
    assert sketch_distance(torch.zeros(3), torch.zeros(4)) == math.inf
    assert sketch_distance(torch.zeros(3), torch.zeros(3)) == 0.0


def test_storage_names() -> None:
    assert storage_of(nn.Linear(2, 2)) == "dense"
    assert storage_of(nn.Linear(2, 2).to(torch.bfloat16)) == "dense"


class Pair(nn.Linear):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return super().forward(x), x


class Rectified(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(super().forward(x))


@pytest.mark.parametrize(
    ("kind", "why"), [(Pair, "returns a tuple, not a tensor"), (Rectified, "is not affine in its input")]
)
def test_layers_that_look_linear_and_are_not(kind: type[nn.Linear], why: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), kind(8, 8))
    with pytest.raises(
        ll.UnsupportedLayer, match=rf"1, a {kind.__name__} \(dense\), {why}; leave it out with exclude_names=\(…, '1'\)"
    ):
        ll.attach(model, ll.LoRAConfig(r=2))
    ll.attach(model, ll.LoRAConfig(r=2, exclude_names=("1",)))
