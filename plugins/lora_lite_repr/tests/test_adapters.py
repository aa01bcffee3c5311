"""Bottleneck adapters, behind a block and beside it, against their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_lite as ll
from tests.oracles import assert_same

WIDTH = 12


class Block(nn.Module):
    """x (…, d) → (…, d), and a second result, as attention has."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x + torch.tanh(self.inner(x)), "more"


class First(nn.Module):
    """The first result of a block, with the block's adapter's tensors by name."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        y, more = self.block(x)
        assert more == "more"
        return y

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name) if name.startswith("lora_") else super().__getattr__(name)


def filled(name: str, **fields: Any) -> tuple[Any, Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([Block()])}).double()
    adapter = ll.attach(model, ll.LoraLiteConfig(variant=name, r=5, **fields))
    assert adapter.targets == ("blocks.0",)
    layer, x = First(model["blocks"][0]), torch.randn(3, 4, WIDTH, dtype=torch.float64, requires_grad=True)  # type: ignore[index]
    with ll.disabled(model):
        frozen = layer(x)
    assert torch.equal(layer(x), frozen), "step 0"
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    p = {bare: tensor.detach().clone().requires_grad_() for bare, tensor in adapter.layers()["blocks.0"].params.items()}
    return layer, x, p


def base(layer: Any, x: Tensor) -> Tensor:
    inner = layer.block.inner
    return x + torch.tanh(x @ inner.weight.T + inner.bias)


def phi(z: Tensor) -> Tensor:
    return z * (1 + torch.erf(z / 2**0.5)) / 2


@pytest.mark.parametrize(("activation", "f"), [("gelu", phi), ("relu", lambda z: z * (z > 0)), ("silu", lambda z: z / (1 + (-z).exp()))])  # fmt: skip
def test_houlsby(activation: str, f: Any) -> None:
    layer, x, p = filled("houlsby", activation=activation)
    h = base(layer, x)
    expected = h + f(h @ p["lora_D"].T + p["lora_b"]) @ p["lora_U"].T + p["lora_c"]
    assert_same(layer, x, expected, p, 1e-10)


@pytest.mark.parametrize("scale", [4.0, -0.5])
def test_parallel(scale: float) -> None:
    layer, x, p = filled("parallel", **({} if scale == 4 else {"scale": scale}))
    z = x @ p["lora_D"].T + p["lora_b"]
    expected = base(layer, x) + scale * (z * (z > 0) @ p["lora_U"].T + p["lora_c"])
    assert_same(layer, x, expected, p, 1e-10)


@pytest.mark.parametrize("name", ["houlsby", "parallel"])
def test_beside_the_parts_of_a_transformer(name: str) -> None:
    """Where the papers put them: attention returns a tuple, and gets its input by keyword."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=20, num_hidden_layers=2, **sizes)).eval()
    ids = torch.randint(0, 20, (2, 6))
    before = model(ids).logits
    adapter = ll.attach(model, ll.LoraLiteConfig(variant=name, r=4, target_names=("self_attn$", "mlp$")))
    assert adapter.targets == tuple(f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn", "mlp"))
    assert sum(p.numel() for p in adapter.parameters()) == 4 * (2 * 4 * 16 + 4 + 16)
    assert torch.equal(model(ids).logits, before)
    seen: dict[str, Tensor] = {}
    mlp, p = model.model.layers[1].mlp, adapter.layers()["model.layers.1.mlp"].params
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    mlp.register_forward_hook(lambda module, args, y: seen.update(x=args[0], y=y))
    model(ids)
    x = seen["x"]
    frozen = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    z, f, s = (frozen, phi, 1.0) if name == "houlsby" else (x, torch.relu, 4.0)
    change = f(z @ p["lora_D"].T + p["lora_b"]) @ p["lora_U"].T + p["lora_c"]
    torch.testing.assert_close(seen["y"], frozen + s * change, rtol=1e-4, atol=1e-5)


def test_refusals() -> None:
    with pytest.raises(
        ll.ConfigError, match=r"HoulsbyConfig\(activation='tanh'\): it is one of 'gelu', 'relu', 'silu'"
    ):
        ll.LoraLiteConfig(variant="houlsby", activation="tanh")
    for scale in (0, float("nan"), "4"):
        with pytest.raises(ll.ConfigError, match=r"ParallelConfig\(scale=.*\): (it|scale) is a finite number"):
            ll.LoraLiteConfig(variant="parallel", scale=scale)
