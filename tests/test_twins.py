"""Every variant on quantised and transposed layers trains as it does on the dense twin that holds the same weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll

from .test_variants import VARIANTS, config

bnb = pytest.importorskip("bitsandbytes")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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


def pair(kind: str) -> tuple[nn.Sequential, nn.Sequential]:
    """A model of such layers, and its twin of plain ones with the weights that they stand for."""
    torch.manual_seed(0)
    plain = [nn.Linear(64, 96), nn.Linear(96, 64)]
    special = [stored(kind, layer).to(DEVICE) for layer in plain]  # bitsandbytes quantises on the way
    twins = []
    for layer, source in zip(special, plain, strict=True):
        twin = nn.Linear(source.in_features, source.out_features)
        twin.weight = nn.Parameter(ll.dense_weight(layer).clone())
        twin.bias = nn.Parameter(layer.bias.detach().clone())
        twins.append(twin)
    return nn.Sequential(special[0], nn.Tanh(), special[1]), nn.Sequential(twins[0], nn.Tanh(), twins[1])


def near(got: Tensor, expected: Tensor, limit: float = 2e-2) -> None:
    got, expected = got.detach().double(), expected.detach().double()
    assert float((got - expected).norm()) <= limit * float(expected.norm()) + 1e-6


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")  # of those
@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("name", VARIANTS)
def test_training_is_that_of_the_dense_twin(name: str, kind: str) -> None:
    model, twin = pair(kind)
    x, goal = torch.randn(24, 64).to(DEVICE), torch.randn(24, 64).to(DEVICE)
    # A measured baseline before attach, as people do.
    with torch.no_grad():
        near(model.eval()(x), twin.eval()(x))
    cfg = config(name)
    adapters = [ll.attach(one, cfg, calibration_data=[x] * 3 if name == "eva" else None) for one in (model, twin)]
    for (_, ours), (_, theirs) in zip(*(adapter.named_tensors() for adapter in adapters), strict=True):
        near(ours, theirs)
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
            near(ours.grad, theirs.grad)
        for optimizer in steps:
            optimizer.step()
        if step == 10:
            with torch.no_grad():
                near(model.eval()(x), twin.eval()(x))
    with torch.no_grad():
        near(model.eval()(x), twin.eval()(x))


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


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("storage", ["4bit", "8bit"])
@pytest.mark.parametrize("name", ["lora", "pissa", "dora", "hra"])
def test_models_that_transformers_has_quantised(folder: Path, tmp_path: Path, name: str, storage: str) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    def load() -> Any:
        quantisation = BitsAndBytesConfig(
            load_in_4bit=storage == "4bit", load_in_8bit=storage == "8bit", bnb_4bit_quant_type="nf4"
        )
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantisation, device_map=DEVICE)

    model, tokens = load(), torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.no_grad():
        base = model(tokens).logits
    adapter = ll.attach(model, config(name), check_inputs={"input_ids": tokens})
    assert len(adapter.targets) == 14
    with torch.no_grad():
        start = model(tokens).logits
    assert torch.allclose(start, base, atol=1e-4)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    with torch.no_grad():
        trained = model(tokens).logits
    adapter.save(tmp_path / "a.safetensors")
    again = load()
    ll.load(again, tmp_path / "a.safetensors")
    with torch.no_grad():
        near(again(tokens).logits, trained, 1e-4)
    done = ll.export_lora(model, tmp_path / "lora", rank=8)
    assert len(done.errors) == 14
    with pytest.raises(ll.MergeError, match="does not hold a plain dense weight"):
        ll.merge(model)
