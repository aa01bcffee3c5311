"""Tiny models made of config classes, and what is asked of every one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

# Of transformers, TRL and torchao themselves; the messages of ours are not FutureWarnings.
FOREIGN = ("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*pin_memory.*:UserWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "lora_lite_transformers" in item.path.parts:
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
