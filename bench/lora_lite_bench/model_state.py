"""What is read off a model: a hash of its weights, and what an adapter has done to singular values and directions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import nn

import lora_lite_core as ll


@torch.no_grad()
def spectrum(adapter: ll.Adapter) -> Iterable[tuple[str, dict[str, list[float]]]]:
    """How far each layer's singular values are shifted and its singular directions turned, where a variant does that:
    (layer, {"shift": δ_i / S_i, "angle": the largest rotation of each block, in radians})."""
    offset_of = getattr(adapter.record.variant.namespace, "block_offset", None)
    for name, target in adapter.layers().items():
        found = target.params
        if offset_of is None or not {"lora_S", "lora_dS"} <= found.keys():
            continue
        shift = (found["lora_dS"] / found["lora_S"].clamp_min(1e-12)).cpu()
        angles: list[float] = []
        for T in (found[key] for key in ("lora_TV", "lora_TU") if key in found):
            offset = offset_of(T, target.cfg, T)
            turn = offset + torch.eye(offset.shape[-1], device=offset.device)
            angles += [round(angle, 5) for angle in torch.linalg.eigvals(turn).angle().abs().amax(-1).tolist()]
        yield name, {"shift": [round(value, 5) for value in shift.tolist()], "angle": angles}


def weights_hash(model: nn.Module, names: set[str]) -> str:
    """A hash of the named parameters and buffers, by name and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name in names:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
