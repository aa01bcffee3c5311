"""LoReFT and DiReFT against their formulas; the positions that they change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import lora_lite as ll
from tests.oracles import assert_same

WIDTH = 12
NAMES = ["loreft", "direft"]


class Model(nn.Module):
    """One block, which returns what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))])
        self.blocks[0][0].weight.data = torch.eye(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.blocks[0], name) if name.startswith("lora_") else super().__getattr__(name)


def filled(name: str, **fields: Any) -> tuple[Any, Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Model().double()
    adapter = ll.attach(model, ll.LoraLiteConfig(variant=name, r=4, **fields))
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.equal(model(x), x), "step 0"
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    p = {bare: tensor.detach().clone().requires_grad_() for bare, tensor in adapter.layers()["blocks.0"].params.items()}
    return model, x, p


def gram_schmidt(rows: Tensor) -> Tensor:
    made: list[Tensor] = []
    for row in rows:
        for one in made:
            row = row - (row @ one) * one
        made.append(row / row.square().sum().sqrt())
    return torch.stack(made)


def test_loreft() -> None:
    block, x, p = filled("loreft")
    R = gram_schmidt(p["lora_R"])
    W = R + p["lora_dW"]
    expected = torch.stack([h + R.T @ (W @ h + p["lora_b"] - R @ h) for h in x.flatten(0, 1)]).view(x.shape)
    assert_same(block, x, expected, p, 1e-10)


def test_direft() -> None:
    block, x, p = filled("direft")
    expected = torch.stack([h + p["lora_W2"].T @ (p["lora_W1"] @ h + p["lora_b"]) for h in x.flatten(0, 1)])
    assert_same(block, x, expected.view(x.shape), p, 1e-10)


def test_lorefts_start_and_subspace() -> None:
    """Orthonormal at the start; the output changes in the subspace alone, and does not jump with the first number's
    sign, which decides the signs of a library's QR."""
    adapter = ll.attach(Model().double(), ll.LoraLiteConfig(variant="loreft", r=4))
    R = adapter.layers()["blocks.0"].params["lora_R"].detach()
    torch.testing.assert_close(R @ R.T, torch.eye(4).double())
    block, x, p = filled("loreft")
    change = (block(x) - x).detach().flatten(0, 1)
    basis = gram_schmidt(p["lora_R"]).detach()
    torch.testing.assert_close(change @ basis.T @ basis, change)
    outputs = []
    for first in (-1e-9, 1e-9):
        block.lora_R.data[0, 0] = first
        outputs.append(block(x).detach())
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, num_hidden_layers=2, eos_token_id=None, **sizes)).eval()


def changed(name: str, ids: Tensor, mask: Tensor | None, **fields: int) -> list[list[int]]:
    """Which positions of a model's last hidden states are not the base's, where only its last block is adapted."""
    model = llama()
    adapter = ll.attach(model, ll.LoraLiteConfig(variant=name, r=4, layers=(1,), **fields))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    given = {"input_ids": ids, "attention_mask": mask}
    y = model(**given).logits
    with ll.disabled(model):
        differs = (y != model(**given).logits).any(-1)
    return [row.nonzero().flatten().tolist() for row in differs]


@pytest.mark.parametrize("name", NAMES)
def test_positions(name: str) -> None:
    ids = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(0))
    assert changed(name, ids, None) == [[0, 1, 2, 3, 4, 5]] * 2
    assert changed(name, ids, None, first=2, last=1) == [[0, 1, 5]] * 2
    assert changed(name, ids, None, first=4, last=4) == [[0, 1, 2, 3, 4, 5]] * 2
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])  # padded on the right, and on the left
    assert changed(name, ids, mask, first=1, last=2) == [[0, 2, 3], [1, 4, 5]]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_generated_is_left_alone(name: str, masked: bool) -> None:
    """The prompt's positions are changed once, and stay so in the cache."""
    model = llama()
    adapter = ll.attach(model, ll.LoraLiteConfig(variant=name, r=4, first=1, last=1))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    ids = torch.randint(0, 20, (1, 6), generator=torch.Generator().manual_seed(1))
    masks: list[Any] = [{"attention_mask": torch.ones(1, length)} if masked else {} for length in (6, 7)]
    with torch.no_grad():
        cached = model(input_ids=ids, **masks[0], use_cache=True, past_key_values=DynamicCache())
        prompt = model(input_ids=ids, **masks[0], use_cache=True)
        assert torch.equal(prompt.logits, cached.logits)
        cache, token = prompt.past_key_values, prompt.logits[:, -1:].argmax(-1)
        with ll.disabled(model):
            assert not torch.equal(prompt.logits, model(input_ids=ids, **masks[0]).logits)
            expected = model(input_ids=token, **masks[1], past_key_values=copy.deepcopy(cache)).logits
        got = model(input_ids=token, **masks[1], past_key_values=cache).logits
    assert torch.equal(got, expected)


def test_refusals() -> None:
    for name, method in (("loreft", "LoReFT"), ("direft", "DiReFT")):
        with pytest.raises(ll.ConfigError, match=rf"{method}Config\(first=-1, last=0\): numbers of positions, from 0"):
            ll.LoraLiteConfig(variant=name, first=-1)
    with pytest.raises(ll.TargetError, match=r"LoReFTConfig\(r=17\) on a block of width 16: r is at most 16"):
        ll.attach(llama(), ll.LoraLiteConfig(variant="loreft", r=17))
