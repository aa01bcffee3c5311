"""IA3 and IA3-FF against their formulas and against the peft package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll

CONFIGS = {"ia3": ll.IA3Config, "ia3_ff": ll.IA3FFConfig}


def filled(name: str, dtype: torch.dtype, bias: bool = True) -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 7, bias=bias)).to(dtype)
    for parameter in ll.attach(model, CONFIGS[name]()).parameters():
        nn.init.normal_(parameter)
    return model[0], torch.randn(5, 12, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_formula(name: str, bias: bool) -> None:
    layer, x = filled(name, torch.float64, bias)
    gate = (1 + layer.lora_g.detach()).requires_grad_()
    if name == "ia3":
        expected = F.linear(x, gate[:, None] * layer.weight, gate * layer.bias if bias else None)
    else:
        expected = F.linear(x, layer.weight * gate, layer.bias)
    got = layer(x)
    assert float((got - expected).detach().abs().max()) < 1e-12
    direction = torch.randn_like(got)
    ours = torch.autograd.grad(got, (x, layer.lora_g), direction)
    theirs = torch.autograd.grad(expected, (x, gate), direction)
    assert all(float((a - b).detach().abs().max()) < 1e-12 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("name", "count"), [("ia3", 7), ("ia3_ff", 12)])
def test_number_of_parameters(name: str, count: int) -> None:
    layer, _ = filled(name, torch.float32)
    assert layer.lora_g.numel() == count


@pytest.mark.parametrize("name", CONFIGS)
def test_the_gradient_is_alive_at_step_0(name: str) -> None:
    layer, x = filled(name, torch.float32)
    nn.init.zeros_(layer.lora_g)
    layer(x).square().sum().backward()
    assert bool((layer.lora_g.grad != 0).all())


@pytest.mark.parametrize("name", CONFIGS)
def test_parity_with_peft(name: str) -> None:
    peft = pytest.importorskip("peft")
    layer, x = filled(name, torch.float32)
    twin = nn.Sequential(nn.Linear(12, 7))
    twin[0].load_state_dict({"weight": layer.weight, "bias": layer.bias})
    feedforward = ["0"] if name == "ia3_ff" else []
    theirs = peft.get_peft_model(twin, peft.IA3Config(target_modules=["0"], feedforward_modules=feedforward))
    gate = theirs.base_model.model[0].ia3_l["default"]
    gate.data = (1 + layer.lora_g.data).reshape(gate.shape)
    ours, expected = layer(x), theirs(x)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    ours.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(layer.lora_g.grad, gate.grad.flatten(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_channels_of_a_convolution(dims: int) -> None:
    """The gate is the image's own."""
    torch.manual_seed(0)
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    layer, x = kind(4, 6, 3, stride=2, padding=1).double(), torch.randn(2, 4, *(9, 8, 7)[:dims], dtype=torch.float64)
    twin = kind(4, 6, 3, stride=2, padding=1).double()
    twin.load_state_dict(layer.state_dict())
    ll.attach(nn.Sequential(layer), ll.IA3FFConfig(channels=True, target_names=("0",)))
    assert layer.lora_g.shape == (4,)
    nn.init.normal_(layer.lora_g)
    x.requires_grad_()
    gate = (1 + layer.lora_g.detach()).requires_grad_()
    got, expected = layer(x), twin(x * gate.view(4, *(1 for _ in range(dims))))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(got)
    ours = torch.autograd.grad(got, (x, layer.lora_g), direction)
    for a, b in zip(ours, torch.autograd.grad(expected, (x, gate), direction), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("layer", "cfg", "told"),
    [
        (nn.Conv1d(4, 4, 3), ll.IA3Config(target_names=("0",)), r"PEFT's IA3 takes no Conv1d; merge\(model\)"),
        (nn.Conv1d(4, 4, 1), ll.IA3FFConfig(target_names=("0",)), r"PEFT's IA3 takes no Conv1d; merge\(model\)"),
        (
            nn.Conv2d(4, 4, 3),
            ll.IA3FFConfig(target_names=("0",)),
            r"IA3FFConfig\(channels=False\) on a Conv2d gates each entry of a patch, .* as channels=True does; merge\(mod",
        ),
        (
            nn.Conv2d(4, 4, 3, padding=(0, 1)),
            ll.BOFTConfig(block_size=4, factors=1, target_names=("0",)),
            r"PEFT's BOFT takes the first of padding=\(0, 1\) for both dimensions",
        ),
        (
            nn.Conv2d(4, 4, (2, 1)),
            ll.HRAConfig(r=2, target_names=("0",)),
            r"PEFT's HRA takes the first of kernel_size=\(2, 1\) for both dimensions",
        ),
        (
            nn.Conv1d(4, 4, 3),
            ll.HRAConfig(r=2, target_names=("0",)),
            r"PEFT's HRA takes nn\.Linear layers, not a Conv1d",
        ),
    ],
)
def test_convolutions_that_peft_has_not(layer: nn.Module, cfg: ll.AdapterConfig, told: str, tmp_path: Path) -> None:
    model = nn.Sequential(layer)
    ll.attach(model, cfg)
    with pytest.raises(ll.MergeError, match=told):
        ll.export_peft(model, tmp_path / "none")
