"""Tensors that PEFT keeps once for all layers, as VeRA's projections and VB-LoRA's bank: `base_model.vera_A`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ....contract.errors import MergeError

TOP = "base_model."


def common_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a folder that belong to no layer, by the names that `from_peft` sees beside a layer's own."""
    return {key: tensor for key, tensor in tensors.items() if key.startswith(TOP) and "." not in key[len(TOP) :]}


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
