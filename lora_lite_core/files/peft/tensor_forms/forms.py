"""How PEFT keeps the tensors of layers that are not linear: convolutions, embeddings, fused experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ....attached.targets.places import Place
from ....contract.errors import AdapterFileError, MergeError
from ....contract.target import Target
from ....layers.kinds.convolution import is_convolution
from ....layers.kinds.embedding import is_embedding
from ....layers.kinds.layer_kinds import is_plain
from .tied_tokens import ROWS

INNER = "base_layer."  # PEFT wraps a module once for each of its parameters; the last one's name comes without
_TABLES = {"lora_A.weight": "lora_embedding_A", "lora_B.weight": "lora_embedding_B"}


def keys_of(targets: Mapping[str, Target]) -> dict[str, str]:
    """What PEFT's names of each target's tensors begin with."""
    keys: dict[str, str] = {}
    for path, target in targets.items():
        if not target.part:
            keys[path] = f"{path}."
            continue
        module = path.rpartition(".")[0]
        parts = [one.part for one in targets.values() if one.layer is target.layer]
        keys[path] = f"{module}.{INNER * _outside(target.layer, target.part, parts)}"
    return keys


def place_of_key(module: nn.Module, parts: Iterable[str], name: str) -> tuple[str, str]:
    """Of a tensor's name behind that of a module with fused experts: the parameter, and the name without nesting."""
    adapted = set(parts)
    inside = [part for part in module._parameters if part in adapted]
    depth = 0
    while name.startswith(INNER):
        name, depth = name[len(INNER) :], depth + 1
    if depth >= len(inside):
        raise AdapterFileError(f"{INNER * depth}{name}: the config selects {len(inside)} parameters of its module")
    return inside[-1 - depth], name


def _outside(module: nn.Module, part: str, parts: Sequence[str]) -> int:
    """How many wrappers are around the one of this parameter: those of the parameters after it."""
    order = [one for one in module._parameters if one in parts]
    return len(order) - 1 - order.index(part)


def written_form(target: Target, each: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """A layer's tensors (of experts: those of each) as PEFT keeps them. MergeError where it is not said how. Of a
    convolution those of LoRA get its form here, what has another name is as to_peft has made it for this layer."""
    layer: Any = target.layer
    if target.kind == "experts":
        return _of_experts(target, each)
    tensors = dict(each[0])
    if is_embedding(layer) and ROWS not in tensors:
        if unknown := [name for name in tensors if name not in _TABLES]:
            raise MergeError(
                f"{unknown[0]} of an embedding has no form in PEFT that is known here; merge(model) instead"
            )
        scaled = {**tensors, "lora_B.weight": tensors["lora_B.weight"] / getattr(layer, "embed_scale", 1)}
        return {_TABLES[name]: tensor for name, tensor in scaled.items()}
    if not is_convolution(layer):
        return tensors
    if any(map(_of_lora, tensors)) and (differs := _of_another_convolution(layer)):
        raise MergeError(f"{differs}; merge(model) instead")
    kernel, ones = layer.weight.shape[1:], (1,) * len(layer.kernel_size)
    shapes = {
        "lora_A.weight": lambda tensor: (len(tensor), *kernel),
        "lora_B.weight": lambda tensor: (*tensor.shape, *ones),
        "lora_B.bias": lambda tensor: tensor.shape,
        "lora_magnitude_vector": lambda tensor: (1, len(tensor), *ones),
    }
    return {
        name: tensor.reshape(shapes[name](tensor)) if name in shapes else tensor for name, tensor in tensors.items()
    }


def _of_experts(target: Target, each: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """A: ranks of the first expert, of the second …; B: all experts of the first rank, of the second …"""
    if unknown := [name for name in each[0] if name not in _TABLES]:
        raise MergeError(f"{unknown[0]} of {target.name}: PEFT has no more than LoRA for fused experts")
    A, B = (torch.stack([tensors[name] for tensors in each]) for name in _TABLES)
    return {"lora_A.weight": A.flatten(0, 1), "lora_B.weight": B.permute(1, 2, 0).flatten(1)}


def read_form(place: Place, name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """The name and form that one of a layer's tensors in PEFT's folder has on a linear layer, a stack for experts;
    AdapterFileError where PEFT's adapter computes something else than it would here."""
    layer: Any = place.layer
    if place.kind == "experts":
        return name, _stacked(place, name, tensor)
    if is_embedding(layer):
        plain = {table: linear for linear, table in _TABLES.items()}.get(name, name)
        scale = getattr(layer, "embed_scale", 1) if name == "lora_embedding_B" else 1
        return plain, tensor * scale
    if not is_convolution(layer):
        return name, tensor
    if _of_lora(name) and (differs := _of_another_convolution(layer)):
        raise AdapterFileError(f"{name}: {differs}")
    if name.startswith("lora_magnitude"):
        return name, tensor.flatten()
    return name, tensor.flatten(1) if tensor.dim() > 2 else tensor


def as_stored(place: Place, name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """The same where PEFT adds B A to a layer's weight as it is stored: of Conv1D and of embeddings, transposed."""
    if is_plain(place.layer) or name not in _TABLES:
        return name, tensor
    other = next(one for one in _TABLES if one != name)
    scale = getattr(place.layer, "embed_scale", 1) if other == "lora_B.weight" else 1
    return other, tensor.mT * scale if tensor.dim() == 2 else tensor


def _stacked(place: Place, name: str, tensor: Tensor) -> Tensor:
    """(E, r, d_in) and (E, d_out, r)."""
    count = place.experts
    if tensor.dim() != 2 or name not in _TABLES:
        raise AdapterFileError(f"{name} {tuple(tensor.shape)} is nothing that PEFT has for fused experts")
    ranks = tensor.shape[0] if name == "lora_A.weight" else tensor.shape[1]
    if ranks % count:
        raise AdapterFileError(f"{name} {tuple(tensor.shape)} is not of {count} experts")
    if name == "lora_A.weight":
        return tensor.unflatten(0, (count, -1))
    return tensor.unflatten(1, (-1, count)).permute(2, 0, 1)


def _of_lora(name: str) -> bool:
    """Whether a tensor is one of PEFT's LoRA, DoRA or AdaLoRA, which run a convolution of their own; of other methods
    to_peft and from_peft know on which layers they compute the same."""
    return name.startswith("lora_")


def _of_another_convolution(layer: Any) -> str:
    if layer.groups != 1:
        return f"a convolution with groups={layer.groups}, which a low-rank product is not"
    if set(layer.dilation) == {1} and layer.padding_mode == "zeros":
        return ""
    return (
        f"a convolution with dilation={layer.dilation} and padding_mode={layer.padding_mode!r}: PEFT's adapters run "
        "without dilation and pad with zeros, so that they compute something else"
    )
