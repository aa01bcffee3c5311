"""The weights that layers get when their adapters are folded into them, computed before one of them is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..attached.layer_hooks.layer_state import state_of
from ..attached.layer_hooks.putting import hook_in_between
from ..attached.model_checks import GATHER, check_attachable, check_not_sharded
from ..attached.records import targets_of
from ..attached.targets.experts import single
from ..contract.errors import MergeError
from ..contract.target import Target
from ..layers.kinds.convolution import is_convolution
from ..layers.kinds.embedding import is_embedding
from ..layers.kinds.experts import bias_name, keeps_transposed
from ..layers.kinds.layer_kinds import is_conv1d, storage_of
from ..layers.twins import twin_of
from ..layers.weight_reading import base_forward
from .probing import READING, AffineMap, adapted_map, adapters_alone, listed_variants, refuse_block


@dataclass
class Fold:
    """What a layer gets: a weight in the layout and dtype that it has, a bias (or None for none)."""

    name: str
    layer: nn.Module
    weight: Tensor
    bias: Tensor | None
    names: tuple[str, str] = ("weight", "bias")  # of the layer's parameters
    tied: Fold | None = None  # an earlier one, whose parameter this layer has, too


def folds_of(model: nn.Module, names: list[str], to_dense: bool, *, for_good: bool = False) -> list[Fold]:
    check_not_sharded(model, GATHER)
    check_attachable(model, *READING)
    found = {path: target for one in names for path, target in targets_of(model, one).items()}
    owners = _owners(model)
    folds: dict[str, Fold] = {}
    for path, target in found.items():
        refuse_block(target)
        layer, targets = target.layer, adapters_alone(target, names, for_good=for_good)
        if target.kind == "experts":
            folds[path] = _fold_experts(target, targets)
            continue
        if not writable(layer) and not to_dense:
            raise MergeError(
                f"{path} ({storage_of(layer)}) does not hold a plain dense weight, and merging would quantise it anew; "
                "merge(model, to_dense=True) replaces such layers by dense ones, export_lora leaves the base as it is"
            )
        if not writable(layer) and _has_own_hooks(layer):
            raise MergeError(f"{path} has hooks or a forward of its own, which a dense layer in its place would lose")
        if hook := hook_in_between(layer):
            raise MergeError(
                f"{path} has a hook that is not ours ({hook}), between the frozen layer and its adapter: merged "
                "weights would compute something else; remove it first, or register it after attach"
            )
        made = adapted_map(path, layer, targets)
        if is_convolution(layer) and layer.groups != 1:
            _check_rows(path, made)
        fold = folds[path] = _fold(path, layer, made, _dtype(model, layer))
        fold.tied = _tied(path, fold, owners.get(id(layer._parameters.get("weight")), [path]), folds, found)
        if not fold.weight.isfinite().all():
            raise MergeError(f"{path} with {listed_variants(targets)} does not fit {fold.weight.dtype}: it overflows")
        if writable(layer):
            _verify(fold)
    return list(folds.values())


def _check_rows(path: str, made: AffineMap) -> None:
    """Raise MergeError unless every row of a weight in groups is a multiple of what it was: outputs of one group have
    not the inputs of another."""
    old = made.base_weight
    scale = (made.weight * old).sum(1, keepdim=True) / old.square().sum(1, keepdim=True).clamp_min(1e-300)
    if not torch.allclose(made.weight, scale * old, rtol=1e-9, atol=1e-12):
        raise MergeError(
            f"the adapter of {path} mixes outputs of several groups, which its weight cannot; run it as it is"
        )


def _tied(
    path: str, fold: Fold, owners: Sequence[str], folds: Mapping[str, Fold], found: Mapping[str, Target]
) -> Fold | None:
    """The first fold of a weight that several layers have, if they all get the same one; MergeError if not."""
    others = [other for other in owners if other != path]
    if not others:
        return None
    first = folds.get(owners[0], fold)
    if any(other not in found for other in others) or not torch.equal(first.weight, fold.weight):
        raise MergeError(
            f"the weight of {path} is also that of {others[0]}: merging would change both; leave the layer out with "
            "exclude_names, or untie them"
        )
    return None if first is fold else first


def _fold(path: str, layer: nn.Module, found: AffineMap, dtype: torch.dtype) -> Fold:
    weight, bias = found.weight.to(dtype), found.bias.to(dtype)
    if is_embedding(layer):
        return Fold(path, layer, (weight.T / getattr(layer, "embed_scale", 1)).to(dtype).contiguous(), None)
    if is_conv1d(layer):
        weight = weight.T.contiguous()
    if is_convolution(layer):
        weight = weight.reshape(layer.weight.shape)
    return Fold(path, layer, weight, bias if getattr(layer, "bias", None) is not None or bias.any() else None)


@torch.no_grad()
def _fold_experts(target: Target, targets: Sequence[Target]) -> Fold:
    """All experts of one parameter, in its layout."""
    layer, part = target.layer, target.part
    old = layer._parameters[part]
    assert old is not None, part
    bias = bias_name(layer, part)
    weight = torch.empty_like(old)
    shift = layer._parameters[bias] if bias else None
    shifts = None if shift is None else torch.empty_like(shift)
    for index, each in enumerate(zip(*(single(one) for one in targets), strict=True)):
        found = adapted_map(each[0].name, each[0].layer, each)
        weight[index] = found.weight.T if keeps_transposed(layer) else found.weight
        if shifts is not None:
            shifts[index] = found.bias
        elif found.bias.any():
            raise MergeError(f"{target.name} has no bias for what {listed_variants(targets)} shifts its outputs by")
    return Fold(target.name, layer, weight, shifts, (part, bias or "bias"))


def _has_own_hooks(layer: nn.Module) -> bool:
    state = state_of(layer)
    ours = len(state.handles) if state else 0
    return "forward" in vars(layer) or len(layer._forward_hooks) + len(layer._forward_pre_hooks) > ours


def writable(layer: nn.Module) -> bool:
    """Whether the layer's weight is a plain parameter of floating point that can be put in its place."""
    return storage_of(layer) == "dense" and layer._parameters.get("weight") is not None


def _dtype(model: nn.Module, layer: nn.Module) -> torch.dtype:
    """The weight's, or where that is packed, that of the bias or of the base's first parameter in floating point."""
    held = (getattr(layer, "weight", None), getattr(layer, "bias", None))
    base = (p for path, p in model.named_parameters() if not path.rpartition(".")[2].startswith("lora_"))
    return next((t.dtype for t in (*held, *base) if t is not None and t.is_floating_point()), torch.float32)


def put(fold: Fold) -> None:
    """The merged weight in the layer, as new parameters."""
    old = fold.layer._parameters[fold.names[0]]
    assert old is not None, fold.name
    for kind, value in zip(fold.names, (fold.weight, fold.bias), strict=True):
        if value is not None:
            fold.layer._parameters[kind] = nn.Parameter(value.to(old.device), requires_grad=old.requires_grad)
    if fold.tied is not None:
        fold.layer._parameters[fold.names[0]] = fold.tied.layer._parameters[fold.tied.names[0]]


def put_back(fold: Fold, kept: dict[str, nn.Parameter | None]) -> None:
    """The layer's own parameters, moved where the model has moved meanwhile. May be repeated."""
    held = fold.layer._parameters
    for kind in fold.names:
        old, now = kept.get(kind), held.get(kind)
        if kind not in kept:
            held.pop(kind, None)
        elif old is None or now is None or (old.device, old.dtype) == (now.device, now.dtype):
            held[kind] = old
        else:
            held[kind] = nn.Parameter(old.detach().to(now.device, now.dtype), old.requires_grad)


@torch.no_grad()
def _verify(fold: Fold) -> None:
    """Run the layer on the new weight: a class whose forward does more than multiply would show here."""
    twin = twin_of(fold.layer)
    put(replace(fold, layer=twin, tied=None))
    if is_embedding(fold.layer):
        ids = torch.arange(min(8, len(fold.weight)), device=fold.weight.device)
        expected, got = fold.weight[ids] * getattr(fold.layer, "embed_scale", 1), base_forward(twin, ids)
        _check_same(fold, got, expected.to(got.dtype))
        return
    weight = fold.weight.T if is_conv1d(fold.layer) else fold.weight.flatten(1)
    x = torch.eye(8, weight.shape[1], dtype=weight.dtype, device=weight.device)
    expected = nn.functional.linear(x, weight, fold.bias)
    got = base_forward(twin, x)
    _check_same(fold, got, expected)


def _check_same(fold: Fold, got: Tensor, expected: Tensor) -> None:
    if got.shape != expected.shape or not torch.allclose(got, expected, rtol=1e-2, atol=1e-6):
        raise MergeError(
            f"{fold.name} ({type(fold.layer).__name__}) computes more than weight times input; it cannot be merged into"
        )


def _owners(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(path)
    return owners
