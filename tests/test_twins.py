"""Every variant on quantised and transposed layers trains as it does on the dense twin that holds the same weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll

from .test_packing import rearrange
from .test_variants import VARIANTS, config

bnb = pytest.importorskip("bitsandbytes")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Largest relative deviations measured: 5e-6 where torch multiplies by the weights that the layer stands for, 8.5e-3 where
# a kernel rounds: int8 its activations, the evaluation of rearranged 4-bit layers (AVX512-BF16) to bfloat16.
SAME, KERNEL = 1e-4, 2e-2
STORED = ("nf4", "nf4-double", "fp4", "int8", "conv1d", "torchao", "hqq", "quanto", "weight-norm")


def stored(kind: str, plain: nn.Linear) -> Any:
    """The layer in that storage."""
    d_in, d_out = plain.in_features, plain.out_features
    if kind == "conv1d":
        from transformers.pytorch_utils import Conv1D

        layer: Any = Conv1D(d_out, d_in)
        layer.load_state_dict({"weight": plain.weight.detach().T.contiguous(), "bias": plain.bias.detach()})
        return layer
    if kind == "weight-norm":
        return nn.utils.parametrizations.weight_norm(copy.deepcopy(plain))
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        held = nn.Sequential(copy.deepcopy(plain))
        quantize_(held, Int8WeightOnlyConfig())
        return held[0]
    if kind == "hqq":
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        settings = BaseQuantizeConfig(nbits=4, group_size=32)
        return HQQLinear(copy.deepcopy(plain), settings, compute_dtype=torch.float32, device=DEVICE)
    if kind == "quanto":
        from optimum.quanto import freeze, qint8, quantize

        held = nn.Sequential(copy.deepcopy(plain))
        quantize(held, weights=qint8)
        freeze(held)
        return held[0]
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(d_in, d_out, has_fp16_weights=False)
    else:
        quantisation, _, double = kind.partition("-")
        layer = bnb.nn.Linear4bit(d_in, d_out, quant_type=quantisation, compress_statistics=bool(double))
    layer.load_state_dict(plain.state_dict())
    return layer


def of(kind: str) -> nn.Sequential:
    """A model of two such layers; bitsandbytes rearranges only sizes that its blocks of 64 and 32 divide."""
    torch.manual_seed(0)
    special = [stored(kind, layer).to(DEVICE) for layer in (nn.Linear(64, 128), nn.Linear(128, 64))]
    return nn.Sequential(special[0], nn.Tanh(), special[1])  # bitsandbytes has quantised on the way to the device


def twin_of(model: nn.Sequential) -> nn.Sequential:
    """The same of plain layers, with the weights that those stand for now."""
    twin = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)).to(DEVICE)
    for plain, layer in ((twin[0], model[0]), (twin[2], model[2])):
        plain.load_state_dict({"weight": ll.dense_weight(layer), "bias": layer.bias.detach()})
    return twin


def int8_saturates() -> bool:
    """torch's int8 product does where oneDNN is held below a processor's VNNI (ONEDNN_MAX_CPU_ISA), never by itself."""
    largest = torch.full((32, 64), 127, dtype=torch.int8, device=DEVICE)
    return int(torch.ops.bitsandbytes.int8_linear_matmul(largest, largest)[0, 0]) != 64 * 127**2


def near(got: Tensor, expected: Tensor, limit: float) -> None:
    """In the norm; a gradient that is zero is compared absolutely."""
    got, expected = got.detach().double(), expected.detach().double()
    assert float((got - expected).norm()) <= limit * float(expected.norm()) + 1e-6


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")  # of those
@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("name", VARIANTS)
def test_training_is_that_of_the_dense_twin(name: str, kind: str) -> None:
    if kind == "int8" and int8_saturates():
        pytest.skip("the int8 product of this oneDNN saturates")
    model, limit = of(kind), KERNEL if kind == "int8" or DEVICE == "cuda" else SAME
    x, goal = torch.randn(24, 64).to(DEVICE), torch.randn(24, 64).to(DEVICE)
    with torch.no_grad():  # a baseline before attach, as people measure one; it may round the scales of 4-bit layers
        baseline = model.eval()(x)
    cfg, data = config(name), [x] * 3 if name == "eva" else None
    adapters = [ll.attach(model, cfg, calibration_data=data)]
    twin = twin_of(model)
    with torch.no_grad():
        near(baseline, twin(x), KERNEL)
    adapters.append(ll.attach(twin, cfg, calibration_data=data))
    for (_, ours), (_, theirs) in zip(*(adapter.named_tensors() for adapter in adapters), strict=True):
        near(ours, theirs, limit)
        with torch.no_grad():
            ours.copy_(theirs)  # directions of an SVD may differ by more than the weights do
    steps = [torch.optim.SGD(adapter.parameters(), lr=1e-2) for adapter in adapters]
    for step in range(20):
        losses = []
        for one, optimizer in zip((model, twin), steps, strict=True):
            one.train()
            optimizer.zero_grad()
            loss = (one(x) - goal).square().mean()
            loss.backward()
            losses.append(loss)
        for ours, theirs in zip(adapters[0].parameters(), adapters[1].parameters(), strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            near(ours.grad, theirs.grad, limit)
        for optimizer in steps:
            optimizer.step()
        if step == 10:
            with torch.no_grad():
                near(model.eval()(x), twin.eval()(x), limit)
    with torch.no_grad():
        near(model.eval()(x), twin.eval()(x), limit)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_kernels_for_inference_alone_are_refused() -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(
        ll.UnsupportedLayer, match=r"\d, a Linear \(Int8Tensor\), passes no gradient to its input, so that"
    ):
        ll.attach(model, ll.LoRAConfig(r=4))
    assert not any("lora" in key for key in model.state_dict())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).save_pretrained(path)
    return path


FOREIGN = ("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def quantised_llama(folder: Path, bits: int) -> Any:
    """The model as transformers quantises it, and is going to evaluate it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings: dict[str, Any] = {"load_in_4bit": bits == 4, "load_in_8bit": bits == 8, "bnb_4bit_quant_type": "nf4"}
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**settings), device_map=DEVICE
    )
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS.to(DEVICE)).logits


TOKENS = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings(*FOREIGN)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["lora", "pissa", "dora", "hra"])
def test_models_that_transformers_has_quantised(folder: Path, tmp_path: Path, name: str, bits: int) -> None:
    model, tokens = quantised_llama(folder, bits), TOKENS.to(DEVICE)
    ll.prepare(model)
    base = logits(model)
    adapter = ll.attach(model, config(name), check_inputs={"input_ids": tokens})
    assert len(adapter.targets) == 14
    torch.testing.assert_close(logits(model), base, rtol=0, atol=0 if name != "hra" else 1e-4)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    adapter.save(tmp_path / "a.safetensors")
    again = quantised_llama(folder, bits)
    ll.prepare(again)
    ll.load(again, tmp_path / "a.safetensors")
    near(logits(again), logits(model), SAME)
    done = ll.export_lora(model, tmp_path / "lora", rank=8)
    assert len(done.errors) == 14
    with pytest.raises(ll.MergeError, match="does not hold a plain dense weight"):
        ll.merge(model)


@pytest.mark.filterwarnings(*FOREIGN)
@pytest.mark.parametrize("name", ["lora", "pissa"])
def test_an_evaluation_without_prepare_costs_one_rounding_of_the_scales(
    folder: Path, tmp_path: Path, name: str
) -> None:
    """What processors with AVX512-BF16 do to the model at its first evaluation, and files go both ways all the same."""
    prepared, evaluated = (quantised_llama(folder, 4) for _ in range(2))
    ll.prepare(prepared)
    for layer in evaluated.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            rearrange(layer)
    adapters = [ll.attach(model, config(name)) for model in (prepared, evaluated)]
    near(logits(evaluated), logits(prepared), KERNEL)
    for adapter, other in zip(adapters, (evaluated, prepared), strict=True):
        adapter.save(tmp_path / "a.safetensors")
        ll.detach(other)
        ll.prepare(other)
        ll.load(other, tmp_path / "a.safetensors")
