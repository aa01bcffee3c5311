"""Small models for the tests, and what is asked of every model after a call: is it as before?"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

HIDDEN, INNER, VOCAB = 16, 24, 20


class Attention(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HIDDEN, bias=bias)
        self.v_proj = nn.Linear(HIDDEN, HIDDEN, bias=bias)
        self.o_proj = nn.Linear(HIDDEN, HIDDEN, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(torch.tanh(self.q_proj(x)) * self.v_proj(x))


class Block(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.self_attn = Attention(bias)
        self.up_proj = nn.Linear(HIDDEN, INNER, bias=bias)
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(x)
        return x + self.down_proj(torch.relu(self.up_proj(x)))


class Config:
    hidden_size = HIDDEN


class Net(nn.Module):
    """A transformer-like net: token ids (batch, length) → logits (batch, length, VOCAB)."""

    def __init__(self, blocks: int = 2, bias: bool = True) -> None:
        super().__init__()
        self.config = Config()
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Block(bias) for _ in range(blocks))
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for block in self.layers:
            x = block(x)
        return self.lm_head(x)


LINEAR_LAYERS = [
    f"layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "up_proj", "down_proj")
]  # fmt: skip


def net(dtype: torch.dtype = torch.float32, seed: int = 0, blocks: int = 2, bias: bool = True) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(blocks, bias).to(dtype)


def token_ids(seed: int = 0, shape: tuple[int, ...] = (3, 5)) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, adapter: Any, steps: int = 3, lr: float = 1e-2) -> None:
    """A few AdamW steps that move every adapter tensor."""
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=lr, weight_decay=0.0)
    for step in range(steps):
        ids = token_ids(100 + step)
        loss = nn.functional.cross_entropy(model(ids).float().flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def weights_hash(model: nn.Module, names: set[str] | None = None) -> str:
    """Of the bytes of the named tensors (all by default)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if names is None or name in names:
            digest.update(name.encode() + tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a failed or undone call must leave as it was."""
    return {
        "keys": list(model.state_dict()),
        "weights": weights_hash(model),
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "parameters": {name: id(p) for name, p in model.named_parameters()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        "attributes": {name: sorted(vars(m)) for name, m in model.named_modules()},
        "classes": {name: type(m) for name, m in model.named_modules()},
    }
