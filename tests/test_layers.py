"""Base layers: sizes, frozen forward, dense weight, sketch."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite_core.layers.dry_run import misbehaviour
from lora_lite_core.layers.kinds.layer_kinds import layer_sizes, storage_of
from lora_lite_core.layers.weight_sketch import ACROSS_STORAGES, SAME_STORAGE, sketch_distance
from lora_lite_core.weights.probing import dense_twin

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


def test_a_layer_without_a_weight_is_probed() -> None:
    """As HQQ's, which keeps codes in an attribute that is no parameter."""

    class Codes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 300, 7
            self.W_q = torch.randn(7, 300)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.W_q.T

    layer = Codes()
    assert torch.equal(ll.dense_weight(layer), layer.W_q)
    assert storage_of(layer) == "Codes"


def test_parametrised_layers_are_probed_in_their_own_dtype() -> None:
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(20, 7, bias=False).to(torch.bfloat16))
    assert ll.dense_weight(layer).dtype == torch.bfloat16


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


# --- probing does not touch the layer --------------------------------------------------------------------------------


def notes(layer: nn.Module) -> dict[str, Any]:
    """All that a layer holds: objects, bytes and flags."""
    own = dict(vars(layer))
    weight = own["_parameters"].get("weight")  # layer.weight would run a parametrisation
    held = {
        name: (id(tensor), None if tensor is None else tensor.tolist()) for name, tensor in own["_parameters"].items()
    }
    return own | {"_parameters": held, "weight": weight is not None and (dict(vars(weight)), weight._version)}


class Restless(nn.Linear):
    """Writes itself in forward, also in eval mode."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros(()))
        self.inputs: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.inputs.append(x)
        self.weight.data.mul_(1.0)
        with torch.no_grad():
            self.weight.mul_(1.0)
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


def of_bitsandbytes(kind: str, **options: Any) -> Any:
    return getattr(pytest.importorskip("bitsandbytes").nn, kind)(64, 64, **options).to("cpu").to(torch.bfloat16)


def kinds() -> dict[str, Callable[[], nn.Module]]:
    return {
        "Conv1D": lambda: Conv1D(64, 64),
        "Subclass": lambda: Subclass(64, 64),
        "Restless": lambda: Restless(64, 64),
        "8-bit": lambda: of_bitsandbytes("Linear8bitLt", has_fp16_weights=False),
        "4-bit": lambda: of_bitsandbytes("Linear4bit", quant_type="nf4"),
        "spectral": lambda: torch.nn.utils.parametrizations.spectral_norm(nn.Linear(64, 64)),
    }


READS = {
    "dense_weight": ll.dense_weight,
    "sketch": ll.sketch,
    "misbehaviour": misbehaviour,
    "dense_twin": lambda layer: dense_twin(layer, torch.device("cpu")),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("kind", kinds())
def test_reading_a_layer_does_not_touch_it(kind: str, read: Callable[[nn.Module], Any]) -> None:
    layer = kinds()[kind]().train()
    buffers = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    before = notes(layer)
    read(layer)
    assert notes(layer) == before
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in layer.named_buffers())


def test_a_layer_is_read_in_eval_mode() -> None:
    layer = Restless(64, 7)
    assert torch.equal(ll.dense_weight(layer), layer.weight)
    assert torch.equal(ll.sketch(layer), ll.sketch(layer))
    assert layer.training


def test_a_merge_tries_the_new_weight_on_a_twin_in_eval_mode() -> None:
    model = nn.Sequential(Restless(64, 7))
    ll.attach(model, ll.LoRAConfig(r=2))
    before = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    ll.merge(model)
    assert torch.equal(model[0].weight, before[0])
    assert torch.equal(model[0].bias, before[1])
    assert (float(model[0].calls), model[0].inputs) == (0, [])


def test_the_adapter_is_probed_in_eval_mode_for_a_merge() -> None:
    assert not dense_twin(nn.Linear(3, 3), torch.device("cpu")).training


def test_a_plain_weight_is_looked_at_not_computed() -> None:
    layer, conv = nn.Linear(5, 7), Conv1D(7, 5)
    assert ll.dense_weight(layer).data_ptr() == layer.weight.data_ptr()
    assert ll.dense_weight(conv).data_ptr() == conv.weight.data_ptr()
    layer.forward = conv.forward = None  # type: ignore[method-assign, assignment]
    ll.sketch(layer)
    ll.sketch(conv)


@pytest.mark.parametrize("read", [ll.dense_weight, ll.sketch, READS["dense_twin"]], ids=["weight", "sketch", "twin"])
@pytest.mark.parametrize("kind", ["Conv1D", "Subclass", "8-bit", "4-bit"])
def test_other_threads_compute_the_same_while_a_layer_is_read(kind: str, read: Callable[[nn.Module], Any]) -> None:
    layer = kinds()[kind]().eval()
    if "bit" in kind:
        layer.support_avx512bf16_for_cpu = False
    x = torch.randn(3, 64, dtype=layer.bias.dtype)
    with torch.no_grad():
        expected = layer(x)
    outputs: list[torch.Tensor] = []
    stop, started = threading.Event(), threading.Event()

    def run() -> None:
        with torch.no_grad():
            while not stop.is_set():
                outputs.append(layer(x))
                started.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert started.wait(60)
        for _ in range(60):
            read(layer)
    finally:
        stop.set()
        thread.join()
    assert len(outputs) > 1
    assert all(torch.equal(y, expected) for y in outputs)


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_the_layer_computes_in_the_middle_of_a_reading(read: Callable[[nn.Module], Any]) -> None:
    """As above, at the moment at which it matters, whatever the threads do."""
    outputs: list[torch.Tensor] = []

    class Watched(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self is not layer:  # a twin
                outputs.append(layer(probe))
            return super().forward(x)

    layer = Watched(8, 8)
    probe = torch.randn(2, 8)
    expected = layer(probe)
    read(layer)
    assert outputs
    assert all(torch.equal(y, expected) for y in outputs)
    assert all(p.grad is None for p in layer.parameters())
