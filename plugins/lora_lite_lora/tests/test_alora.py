"""aLoRA: on from the last invocation on, in the model's own calls, in generation, and as the peft package does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import lora_lite as ll
from tests.models import Net, token_ids
from tests.oracles import assert_same, filled

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")  # of peft's calls
TOKENS = (1, 2)
IDS = torch.tensor([[5, 3, 1, 2, 6, 4], [1, 2, 4, 1, 2, 1], [7, 7, 1, 7, 7, 1], [2, 7, 7, 7, 1, 2]])
STARTS = [2, 3, 6, 4]  # of the last (1, 2); nowhere in the third


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, num_hidden_layers=2, eos_token_id=None, **sizes)).eval()


def adapted(model: Any, size: float = 0.5) -> Any:
    adapter = ll.attach(model, ll.LoraLiteConfig(variant="alora", r=4, alpha=8.0, invocation_tokens=TOKENS))
    torch.manual_seed(2)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=size)
    return model


def as_lora(model: Any) -> Any:
    """The same factors as a LoRA, on everywhere."""
    tensors = {name: target.params for name, target in ll.adapters(model)["default"].layers().items()}
    lora = copy.deepcopy(model)
    ll.detach(lora)
    for name, target in ll.attach(lora, ll.LoRAConfig(r=4, alpha=8.0)).layers().items():
        for bare, tensor in target.params.items():
            tensor.data.copy_(tensors[name][bare])
    return lora


def test_formula() -> None:
    """A layer by itself, with the positions that are on given as a matrix."""
    layer, _ = filled(ll.LoraLiteConfig(variant="alora", r=4, alpha=6.0, invocation_tokens=TOKENS))
    x = torch.randn(4, 6, 24, dtype=torch.float64, requires_grad=True)
    A, B = (getattr(layer, name).detach().clone().requires_grad_() for name in ("lora_A", "lora_B"))
    on = torch.zeros(4, 6, 1, dtype=torch.float64)
    for row, start in enumerate(STARTS):
        on[row, start:] = 1
    expected = F.linear(x, layer.weight, layer.bias) + on * (x @ (1.5 * B @ A).T)
    hook = ll.get_variant("alora").forward
    cfg = ll.LoraLiteConfig(variant="alora", r=4, alpha=6.0, invocation_tokens=TOKENS)

    class Run(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            given = {"params": {"lora_A": self.lora_A, "lora_B": self.lora_B}, "cfg": cfg, "training": False}
            y = F.linear(x, layer.weight, layer.bias)
            return hook({"x": x, "y": y, "context": {"input_ids": IDS}, **given})  # type: ignore[misc]

    run = Run()
    run.lora_A, run.lora_B = layer.lora_A, layer.lora_B
    assert_same(run, x, expected, {"lora_A": A, "lora_B": B}, 1e-10)


def test_one_layer_of_a_model_is_lora_from_the_start_on() -> None:
    """What comes before is the base's, whatever is on behind it: attention looks back alone."""
    model = adapted(llama())
    lora = as_lora(model)
    got, full = model(IDS).logits, lora(IDS).logits
    with ll.disabled(model):
        base = model(IDS).logits
    for row, start in enumerate(STARTS):
        torch.testing.assert_close(got[row, :start], base[row, :start])
        assert start == 6 or not torch.allclose(got[row, start:], base[row, start:], atol=1e-2)
    torch.testing.assert_close(model(input_ids=IDS[:1, 2:]).logits, lora(IDS[:1, 2:]).logits)
    assert not torch.allclose(full[2], base[2], atol=1e-2)


def test_generation_with_a_cache_needs_the_prompt() -> None:
    model = adapted(llama(), size=1.0)
    prompt = IDS[:2]
    expected = prompt
    for _ in range(5):  # greedy, without a cache; none of the new tokens begins an invocation
        with ll.context(model, prompt_ids=F.pad(prompt, (0, expected.shape[1] - 6), value=0)):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    with ll.context(model, prompt_ids=prompt):
        assert torch.equal(model.generate(prompt, **settings), expected)
    assert not torch.equal(model.generate(prompt, **settings), expected), "off after the prompt"


def test_compiled() -> None:
    """In one graph, with the search for the tokens in it."""
    model = adapted(Net())  # its ids are called `ids`
    with ll.context(model, input_ids=IDS):
        expected = model(IDS)
        torch.compiler.reset()
        got = torch.compile(model, backend="eager", fullgraph=True)(IDS)
    torch.testing.assert_close(got, expected)
    assert not torch.allclose(expected, model(IDS), atol=1e-2), "without the name it is on everywhere"


def test_embeddings_as_inputs_have_it_on() -> None:
    model = adapted(llama())
    embedded = model.get_input_embeddings()(IDS).detach()
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, as_lora(model)(IDS).logits)


TARGETS = ["q_proj", "o_proj", "down_proj"]


@pytest.mark.parametrize("rslora", [False, True])
def test_it_is_that_of_peft_and_its_folders(rslora: bool, tmp_path: Path) -> None:
    import peft

    fields: dict[str, Any] = {"use_rslora": rslora, "task_type": "CAUSAL_LM"}
    cfg = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, alora_invocation_tokens=[1, 2], **fields)
    theirs = peft.get_peft_model(llama(), cfg).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    expected = theirs(input_ids=IDS).logits
    theirs.save_pretrained(tmp_path / "theirs")
    ours = llama()
    adapter = ll.import_peft(ours, tmp_path / "theirs")
    assert {target.variant.name for target in adapter.layers().values()} == {"alora"}
    got = ours(IDS).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    got.square().mean().backward()
    expected.square().mean().backward()
    for name, target in adapter.layers().items():
        inner: Any = theirs.base_model.model.get_submodule(name)
        for side in "AB":
            gradient = getattr(inner, f"lora_{side}")["default"].weight.grad
            torch.testing.assert_close(target.params[f"lora_{side}"].grad, gradient, rtol=1e-3, atol=1e-5)
    ll.export_peft(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(back(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


class Shuffled(nn.Module):
    """A layer that gets the last tokens alone, as one of several experts gets some."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.layer(self.table(input_ids).flatten(0, 1)[-5:])


def test_refusals() -> None:
    model = Shuffled()
    with pytest.raises(ll.ModelStateError, match=r"aLoRA: outputs \(5, 8\) for tokens \(4, 6\); exclude_names such"):
        adapted(model)(IDS)
    with pytest.raises(
        ll.ConfigError, match=r"ALoRAConfig\(invocation_tokens=\(\)\): give one token id or more, as in"
    ):
        ll.LoraLiteConfig(variant="alora")
    model = Net()
    ll.attach(model, ll.LoraLiteConfig(variant="alora", r=2, invocation_tokens=(1,)))
    model(token_ids())
    with pytest.raises(ll.MergeError, match="alora"):
        ll.merge(model)
