"""LN-tuning against norms that are trained themselves, and against the peft package."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll
from tests.oracles import assert_same


class OnePlus(nn.Module):
    """A norm that multiplies by 1 + w, as Gemma's."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Net(nn.Module):
    def __init__(self, make: Any, d: int = 8) -> None:
        super().__init__()
        self.input_layernorm, self.up, self.ln_f = make(d), nn.Linear(d, d), make(d)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln_f(x + torch.tanh(self.up(self.input_layernorm(x))))


MAKES: dict[str, Any] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "one plus": OnePlus}


def made(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = Net(MAKES[name]).to(dtype)
    for norm in (model.input_layernorm, model.ln_f):
        for parameter in norm.parameters():
            nn.init.normal_(parameter, mean=0.5, std=0.4)
    return model


@pytest.mark.parametrize("name", MAKES)
def test_formula(name: str) -> None:
    """As the norm itself with γ' and β', output and gradients."""
    model = made(name, torch.float64)
    norm = copy.deepcopy(model.input_layernorm)
    adapter = ll.attach(model, ll.LNTuningConfig())
    assert adapter.targets == ("input_layernorm", "ln_f")
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.5)
    layer, x = model.input_layernorm, torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    names = {
        n: getattr(layer, n).detach().clone().requires_grad_() for n in ("lora_g", "lora_shift") if hasattr(layer, n)
    }
    assert set(names) == ({"lora_g", "lora_shift"} if name == "layer" else {"lora_g"})
    factor = 1 + names["lora_g"]
    if name == "layer":
        expected = F.layer_norm(x, (8,), factor * norm.weight, factor * norm.bias + names["lora_shift"], norm.eps)
    else:
        eps = torch.finfo(torch.float64).eps if name == "rms" else 1e-6
        gain = norm.weight if name == "rms" else 1 + norm.weight
        expected = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (factor * gain)
    assert_same(layer, x, expected, names, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MAKES)
def test_the_start_and_the_base(name: str, dtype: torch.dtype) -> None:
    model = made(name, dtype)
    x = torch.randn(5, 8).to(dtype)
    before = model(x)
    adapter = ll.attach(model, ll.LNTuningConfig())
    assert torch.equal(model(x), before)
    model(x).float().square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in adapter.parameters())
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)


def test_what_is_a_norm() -> None:
    pattern = ll.LNTuningConfig().target_names[0]
    import re

    found = [
        "norm",
        "model.norm",
        "layers.0.input_layernorm",
        "h.0.ln_1",
        "ln_f",
        "self_attn.q_norm",
        "norm1",
        "x.LayerNorm",
    ]
    assert all(re.search(pattern, name) for name in found)
    assert not any(re.search(pattern, name) for name in ("q_proj", "norm.weight", "ln_1.inner", "mlp.fc1", "kiln"))


def test_norms_of_other_dimensions_are_refused() -> None:
    for norm in (nn.GroupNorm(2, 8), nn.BatchNorm1d(8)):
        model = nn.Sequential()
        model.add_module("norm", norm)
        with pytest.raises(
            ll.TargetError, match=f"norm is a {type(norm).__name__}, which has no weight over the last d"
        ):
            ll.attach(model, ll.LNTuningConfig())
    model = nn.Sequential()
    model.add_module("norm", nn.LayerNorm(8, elementwise_affine=False))
    model.add_module("other", nn.Linear(8, 8))
    with pytest.raises(ll.LoraLiteError):
        ll.attach(model, ll.LNTuningConfig())


peft = pytest.importorskip("peft")
quiet = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning"
)  # peft's own, of layers that are no linear ones


@quiet
@pytest.mark.parametrize("name", MAKES)
def test_parity_with_peft_and_folders_both_ways(name: str, tmp_path: Path) -> None:
    base = made(name)
    config = peft.LNTuningConfig(target_modules=["input_layernorm", "ln_f"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    x = torch.randn(5, 8)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    expected = theirs(x)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(base)
    adapter = ll.import_peft(ours, tmp_path / "theirs")
    assert adapter.record.variant.name == "ln_tuning"
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(base(x), expected, atol=1e-2)
    ours(x).square().mean().backward()
    expected.square().mean().backward()
    for path, target in adapter.layers().items():
        norm = theirs.base_model.model.get_submodule(path).ln_tuning_layers["default"]
        gain = base.get_submodule(path).weight + (1 if name == "one plus" else 0)
        direct = norm.weight.grad * gain  # ∂/∂g = γ ∂/∂γ' + β ∂/∂β'
        if name == "layer":
            torch.testing.assert_close(target.params["lora_shift"].grad, norm.bias.grad, rtol=1e-4, atol=1e-6)
            direct = direct + norm.bias.grad * base.get_submodule(path).bias
        torch.testing.assert_close(target.params["lora_g"].grad, direct, rtol=1e-4, atol=1e-6)
    ll.export_peft(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(back(x), expected, rtol=1e-4, atol=1e-5)


@quiet
def test_a_weight_of_zero_has_no_factor(tmp_path: Path) -> None:
    base = made("layer")
    base.ln_f.weight.data[3] = 0
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LNTuningConfig(target_modules=["ln_f"]))
    theirs.save_pretrained(tmp_path / "same")
    ll.import_peft(copy.deepcopy(base), tmp_path / "same")
    theirs.base_model.model.ln_f.ln_tuning_layers["default"].weight.data[3] = 0.5
    theirs.save_pretrained(tmp_path / "changed")
    with pytest.raises(ll.AdapterFileError, match="ln_f: the norm multiplies by 0 where the folder changes its weight"):
        ll.import_peft(copy.deepcopy(base), tmp_path / "changed")


@quiet
def test_a_llama(tmp_path: Path) -> None:
    """With PEFT's own choice of norms."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, num_hidden_layers=2, **sizes)).eval()
    theirs = peft.get_peft_model(copy.deepcopy(llama), peft.LNTuningConfig(task_type="CAUSAL_LM"))
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    ids = torch.randint(0, 20, (2, 5))
    ours = copy.deepcopy(llama)
    assert len(ll.import_peft(ours, tmp_path / "theirs").targets) == 5
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
