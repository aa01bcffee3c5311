"""The same as `_peft`, for FRoD."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lite_core import ConfigError, MergeError, dense_weight

from ._frod import category, inverse_norms
from ._peft import Pair, full


def _norms(inverse: Tensor) -> Tensor:
    return torch.where(inverse > 0, 1 / inverse, 0)


def frod_to_peft() -> Pair:
    raise MergeError(
        "PEFT makes U of the base and of a V of its own when it loads a folder, and not anew of the V in the file, "
        "whose signs are arbitrary: it would compute something else; merge(model) keeps the change"
    )


def frod_from_peft(config: dict[str, Any], tensors: dict[str, Tensor], layer: nn.Module, name: str) -> Pair | None:
    if config["peft_type"] != "FROD":
        return None
    for field in ("projection_prng_key", "progressbar"):
        config.get(field)  # how the places were drawn, which are in the file; and what PEFT showed of it
    if not config.get("save_projection", True):
        raise ConfigError("save_projection=False: V is determined up to signs alone; save the adapter with True")
    for key in [key for key in tensors if key.startswith("base_model.frod_")]:
        tensors.get(key)  # those of other kinds of layer are theirs
    V, at = (tensors[f"base_model.frod_{key}.{category(name)}"] for key in ("V", "s_indices"))
    d = len(V)
    if V.shape != (d, d) or at.dim() != 2 or len(at) != 2 or not bool(((at >= 0) & (at < d)).all()):
        raise ConfigError(f"frod_V {tuple(V.shape)} is not square, or frod_s_indices {tuple(at.shape)} leave it")
    T = torch.linalg.pinv(V.double()).T
    w = inverse_norms(dense_weight(layer).double() @ T)
    l, entries = full(tensors["frod_lambda_l"]) - _norms(w).to(V.dtype), tensors["frod_lambda_s_values"]
    moved = torch.diag(l).flatten().index_put((at[0] * d + at[1],), entries, True).view(d, d)[w == 0]
    if moved.numel() and float(moved.abs().max()) > 1e-4 * float(_norms(w).max()):
        raise ConfigError(
            f"trains {len(moved)} directions that this layer's weight has not: PEFT's U is rounding noise in them"
        )
    fields = {"sparsity": config["sparse_rate"], "ridge": config["regularization_alpha"]}
    values = {"lora_V": V, "lora_T": T.to(V.dtype), "lora_at": at[0] * d + at[1], "lora_w": w.to(V.dtype)}
    return fields, {**values, "lora_l": l, "lora_s": entries}
