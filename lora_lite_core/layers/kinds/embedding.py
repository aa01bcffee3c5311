"""Embeddings as linear layers: on token ids, which stand for rows of the identity."""

from __future__ import annotations

from typing import TypeGuard

from torch import Tensor, nn
from torch.nn import functional as F


def is_embedding(layer: nn.Module) -> TypeGuard[nn.Embedding]:
    """An nn.Embedding (or a class made of it, such as one that scales) with a plain weight."""
    return isinstance(layer, nn.Embedding) and type(layer._parameters.get("weight")) is nn.Parameter


def embedding_sizes(layer: nn.Embedding) -> tuple[int, int]:
    """(d_in, d_out): how many tokens there are, and the width of their vectors."""
    return layer.num_embeddings, layer.embedding_dim


def is_table(layer: nn.Module) -> TypeGuard[nn.Embedding]:
    """An embedding that does no more than look up rows of its weight."""
    return is_embedding(layer) and type(layer).forward is nn.Embedding.forward and layer.max_norm is None


def project(x: Tensor, A: Tensor) -> Tensor:
    """A x: x (..., d_in), A (r, d_in) → (..., r) in x's dtype, or autocast's. Of an embedding x are token ids (...,),
    and their columns of A are taken, in A's dtype.

    A is cast to x's dtype for the product; gradients reach it in its own.
    """
    if x.is_floating_point():
        return F.linear(x, A.to(x.dtype))
    return F.embedding(x, A.T)
