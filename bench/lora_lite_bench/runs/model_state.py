"""What is read off a model: a hash of its weights, and what an adapter has done to singular values and directions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import lora_lite_core as ll

Change = dict[str, list[float]]
BASIS = (("lora_U", "lora_S", "lora_Vh"), ("lora_U", "lora_S", "lora_P"))  # names of a layer's singular triplets


def spectrum(adapter: ll.Adapter) -> Iterable[tuple[str, Change]]:
    """How far each layer's singular values are shifted and its directions turned, where a variant does that."""
    for name, target in adapter.layers().items():
        yield from changes(adapter.record.variant, name, target.cfg, target.params)


@torch.no_grad()
def changes(variant: Any, name: str, cfg: Any, params: Mapping[str, Tensor]) -> Iterable[tuple[str, Change]]:
    """(layer, {"shift": of each singular value, relative to it, "angle": of directions, in radians}): angles are the
    largest rotation of each block, where a variant rotates blocks, else those by which the image of each input
    direction has turned among the r output directions, or none where nothing has turned. Each of several experts is a
    layer. Nothing for a variant without singular triplets, whose tensors are called as in BASIS."""
    found = {key: tensor.detach().cpu() for key, tensor in params.items()}
    basis = next((names for names in BASIS if found.keys() >= set(names)), None)
    if basis is None:
        return
    if found["lora_S"].dim() > 1:
        for number in range(len(found["lora_S"])):
            yield from changes(variant, f"{name}.{number}", cfg, {key: stack[number] for key, stack in found.items()})
        return
    offset_of = getattr(variant.namespace, "block_offset", None)
    if offset_of is not None and "lora_dS" in found:
        shift, angles = found["lora_dS"] / found["lora_S"].clamp_min(1e-12), list[float]()
        for T in (found[key] for key in ("lora_TV", "lora_TU") if key in found):
            offset = offset_of(T, cfg, T)
            turn = offset + torch.eye(offset.shape[-1])
            angles += torch.linalg.eigvals(turn).angle().abs().amax(-1).tolist()
    else:
        shift, angles = _core_changes(variant, cfg, found, *(found[key].double() for key in basis))
    yield name, {"shift": [round(v, 5) for v in shift.tolist()], "angle": [round(angle, 5) for angle in angles]}


def _core_changes(variant: Any, cfg: Any, found: Any, U: Tensor, S: Tensor, P: Tensor) -> tuple[Tensor, list[float]]:
    """Of a variant W' = W + U M P, M (r, r) being found by running it on inputs x_i with P x_i = e_i."""
    x = torch.linalg.pinv(P).T
    params = {key: tensor.double() if tensor.is_floating_point() else tensor for key, tensor in found.items()}
    given = {"x": x, "y": x.new_zeros(len(S), len(U)), "params": params, "cfg": cfg, "layer": None, "training": False}
    M = (variant.forward(given) @ U).T
    moved = M.diagonal() + S
    aside = (M - torch.diag(M.diagonal())).norm(dim=0)
    if float((aside / S.clamp_min(1e-12)).max()) < 1e-6:
        return M.diagonal() / S.clamp_min(1e-12), []
    return M.diagonal() / S.clamp_min(1e-12), torch.atan2(aside, moved).tolist()


def weights_hash(model: nn.Module, names: set[str]) -> str:
    """A hash of the named parameters and buffers, by name and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name in names:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
