"""Tensors that PEFT keeps once for all layers, as VeRA's projections and VB-LoRA's bank: `base_model.vera_A`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ....contract.errors import MergeError

TOP = "base_model."


def common_tensors(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Those of a folder that belong to no layer, by the names that `from_peft` sees beside a layer's own: one of a
    kind, `base_model.vera_A`, or one for a group of layers, `base_model.frod_V.self_attn_q_proj`."""
    own = TOP[:-1] in model._modules  # a module of this model has that name; transformers' models have a property of it
    return {k: t for k, t in tensors.items() if k.startswith(TOP) and not (own and "." in k[len(TOP) :])}


def joined(found: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    """One tensor of what every layer has under each of these names: the largest, of which the others are the first
    rows and columns. MergeError where they are not."""
    made: dict[str, Tensor] = {}
    for key, tensors in found.items():
        largest = max(tensors, key=Tensor.numel)
        for tensor in tensors:
            part = largest[tuple(slice(size) for size in tensor.shape)]
            if part.shape != tensor.shape or not torch.equal(part, tensor):
                raise MergeError(
                    f"PEFT keeps {key} once for all layers, and these layers have several: {tuple(tensor.shape)} is no "
                    f"corner of {tuple(largest.shape)}"
                )
        made[key] = largest
    return made
