"""Tiny models made of config classes, and what is asked of every one of them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll

# Of PEFT, transformers and torchao themselves; the messages of ours are not FutureWarnings.
FOREIGN = ("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*pin_memory.*:UserWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "lora_lite_peft" in item.path.parts:
            for rule in FOREIGN:
                item.add_marker(pytest.mark.filterwarnings(rule))


@pytest.fixture
def llama() -> Callable[..., Any]:
    """llama(seed=0) is a small LlamaForCausalLM; other models of the family by name."""

    def make(seed: int = 0, kind: str = "LlamaForCausalLM", **fields: Any) -> Any:
        import transformers

        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, **fields
        )  # fmt: skip
        return getattr(transformers, kind)(config).eval()

    return make


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 100, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def train() -> Callable[..., None]:
    """Some steps that move everything that is trained; a model in eval mode stays in it."""

    def steps(model: nn.Module, ids: Tensor, count: int = 3) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
        for _ in range(count):
            out = model(input_ids=ids, labels=ids)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return steps


@pytest.fixture
def shift(registered: Any) -> SimpleNamespace:
    """A variant of somebody else's: y + h, registered as "shift"."""

    class Config(ll.AdapterConfig):
        variant = "shift"

    @ll.hookimpl
    def param_specs(d_out: int) -> dict[str, ll.ParamSpec]:
        return {"lora_h": ll.ParamSpec((d_out,))}

    @ll.hookimpl
    def forward(y: Tensor, params: dict[str, Tensor]) -> Tensor:
        return y + params["lora_h"].to(y.dtype)

    namespace = SimpleNamespace(
        Config=Config, param_specs=param_specs, forward=forward, __name__="shift", __doc__="Shift: y + h."
    )
    registered(namespace, name="shift")
    return namespace
