"""The smaller singular triplets of a weight, which OSF trains, and the directions of the larger ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_lite_core import dense_weight, truncated_svd


def lower_triplets(layer: nn.Module, n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The n smallest as lora_U0 (d_out, n), lora_S0 (n,), lora_V0 (n, d_in), and the kept directions of the longer side
    as lora_Uk (d_out, k) or lora_Vk (k, d_in)."""
    weight = dense_weight(layer)
    U, S, Vh = truncated_svd(weight, min(weight.shape), generator)
    k = len(S) - n
    values = {"lora_U0": U[:, k:], "lora_S0": S[k:], "lora_V0": Vh[k:]}
    if len(U) != Vh.shape[1]:
        values |= {"lora_Uk": U[:, :k]} if len(U) > Vh.shape[1] else {"lora_Vk": Vh[:k]}
    return values


def clear_gradients(p: Mapping[str, Tensor]) -> None:
    """Take the kept directions out of the gradients of dU and dV, in place."""
    if (g := p["lora_dU"].grad) is not None:  # of a layer that took part in the step
        _clear(g, p["lora_U0"], p.get("lora_Uk"))
    if (g := p["lora_dV"].grad) is not None:
        _clear(g.T, p["lora_V0"].T, p["lora_Vk"].T if "lora_Vk" in p else None)


def _clear(gradient: Tensor, smaller: Tensor, kept: Tensor | None) -> None:
    """Of each column. Without `kept`, of the shorter side, the directions of the smaller triplets are what is left."""
    g = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    basis = (smaller if kept is None else kept).to(g.dtype)
    inside = basis @ (basis.T @ g)
    gradient.copy_(inside if kept is None else g - inside)
