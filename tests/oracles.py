"""What the tests of the plugin packages share: a filled layer, equality with a formula, parity with the peft package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_lite as ll

from .models import Net, token_ids

D_IN, D_OUT = 24, 16


def filled(
    cfg: ll.AdapterConfig, dtype: torch.dtype = torch.float64, bias: bool = True, size: float = 1.0
) -> tuple[Any, Tensor]:
    """A layer with that adapter, its trainable tensors random, and an input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D_IN, D_OUT, bias=bias)).to(dtype)
    for parameter in ll.attach(model, cfg).parameters():
        nn.init.normal_(parameter, std=size)
    return model[0], torch.randn(5, D_IN, dtype=dtype, requires_grad=True)


def assert_same(layer: Any, x: Tensor, expected: Tensor, names: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    """Output, gradient of x and of every parameter: `names` maps the layer's parameters to those of the formula."""
    got = layer(x)
    assert float((got - expected).detach().abs().max()) < tolerance
    direction = torch.randn_like(got)
    ours = torch.autograd.grad(got, (x, *(getattr(layer, name) for name in names)), direction)
    theirs = torch.autograd.grad(expected, (x, *names.values()), direction)
    for name, a, b in zip(("x", *names), ours, theirs, strict=True):
        assert float((a - b).abs().max()) < tolerance * (1 + float(b.abs().max())), name


def peft_twin(layer: Any, config: Any) -> tuple[Any, Any]:
    """The same frozen layer under the peft package: (model, its adapted layer)."""
    import peft

    twin = nn.Sequential(nn.Linear(D_IN, D_OUT, bias=layer.bias is not None))
    twin[0].load_state_dict({name: value for name, value in layer.state_dict().items() if name in ("weight", "bias")})
    model = peft.get_peft_model(twin, config)
    return model, model.base_model.model[0]


def assert_parity(layer: Any, x: Tensor, theirs: Any, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Output and gradients against the peft package, float32; each pair is (ours, theirs)."""
    ours, expected = layer(x), theirs(x)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    gradients = [
        torch.autograd.grad(out.square().mean(), [p[i] for p in pairs]) for i, out in enumerate((ours, expected))
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a.flatten(), b.flatten(), rtol=1e-5, atol=1e-5)


def peft_net() -> Net:
    """The small net of the tests, which none of transformers' configs belongs to."""
    torch.manual_seed(0)
    model = Net()
    del model.config
    return model


def saved_by_peft(config: Any, folder: Path, std: float) -> Tensor:
    """A folder of the peft package with random values, and what its model computes of `token_ids()`."""
    import peft

    torch.manual_seed(1)
    model = peft.get_peft_model(peft_net(), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=std)
    model.save_pretrained(folder)
    expected: Tensor = model(token_ids())
    return expected.detach()
