"""Folding adapters into the base's weights, for good or for a while."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..attached.attach_detach import switch_off, switch_on, uninstall
from ..attached.forward_hooks import hook_in_between, state_of
from ..attached.model_checks import check_attachable
from ..attached.records import all_or_nothing, names_of, present_targets, record_of, targets_of
from ..attached.train_modules import current, place, put_trained, tensor_at
from ..contract.errors import MergeError, ModelStateError
from ..layers.convolution import is_convolution
from ..layers.layer_kinds import is_conv1d, storage_of
from ..layers.twins import twin_of
from ..layers.weight_reading import base_forward
from .probing import AffineMap, adapted_map, adapters_alone, listed_variants


@dataclass
class Fold:
    """What a layer gets: a weight in the layout and dtype that it has, a bias (or None for none)."""

    name: str
    layer: nn.Module
    weight: Tensor
    bias: Tensor | None


def merge(model: nn.Module, name: str | None = None, *, to_dense: bool = False) -> None:
    """Fold one adapter, or all of them (None), into the weights, and take it off: the model computes the same without.

    to_dense  replace layers whose weight is quantised or computed by plain nn.Linear ones that hold the merged weight

    Works for every variant that is affine in x: the adapted layer is probed in float64 and rounded once, to the
    weight's dtype. The weights become new parameters; a bias is added where the adapter shifts a layer without one. An
    adapter is merged alone only where it is alone on its layers. All layers are computed before one is changed.

    Raises MergeError for layers that are not dense (without to_dense), tied weights, adapters that are not affine (with
    the measured residual) or not finite; AdapterNameError; ModelStateError for compiled, sharded or meta models.
    """
    names = names_of(model, name)
    folds = _folds(model, names, to_dense)
    with all_or_nothing(model):
        trained = {key: tensor for one in names for key, tensor in current(model, record_of(model, one)).items()}
        uninstall(model, names)
        for key, tensor in trained.items():  # what was trained whole stays
            base = tensor_at(model, key)
            tensor.requires_grad = base is not None and base.requires_grad
            place(model, key, tensor)
        for fold in folds:
            if _writable(fold.layer):
                _put(fold)
            else:
                _replace(model, fold)


@contextmanager
def merged(model: nn.Module, name: str | None = None) -> Generator[None]:
    """Inside, one adapter, or all of them (None), is folded into the weights and switched off, which makes forward
    passes as fast as the base's; after it the model holds its own parameters again, which were never written. For the
    whole process, as `disabled`; what is loaded or copied inside would be lost or wrong, and is refused.

    Raises what `merge` does.
    """
    names = names_of(model, name)
    folds = _folds(model, names, to_dense=False)
    kept = [dict(fold.layer._parameters) for fold in folds]
    block, handles = object(), list[Any]()
    try:
        try:
            handles.append(model.register_load_state_dict_pre_hook(_refuse_loading))
            for one in names:
                for target in targets_of(model, one).values():
                    target.folded = True
            switch_off(model, names, block, "merged")
            for one in names:
                put_trained(model, record_of(model, one))  # what was trained whole stays
            for fold in folds:
                _put(fold)
            yield
        finally:  # twice, so that an interrupt in the first is made good by the second
            _leave(model, names, block, folds, kept, handles)
    finally:
        _leave(model, names, block, folds, kept, handles)


def _leave(
    model: nn.Module,
    names: Sequence[str],
    block: object,
    folds: Sequence[Fold],
    kept: Sequence[dict[str, nn.Parameter | None]],
    handles: Sequence[Any],
) -> None:
    """Out of `merged`: the layers' own parameters are back, and the adapters run. May be repeated."""
    for handle in handles:
        handle.remove()
    for fold, parameters in zip(folds, kept, strict=True):
        _put_back(fold.layer, parameters)
    for one in names:
        for target in present_targets(model, one).values():
            if target is not None:
                target.folded = False
    switch_on(model, names, block)


def _refuse_loading(*_: Any) -> None:
    raise ModelStateError(
        "load_state_dict inside `with merged(model)`: what is loaded would be gone after it; leave that block first"
    )


def _folds(model: nn.Module, names: list[str], to_dense: bool) -> list[Fold]:
    check_attachable(model)
    layers = {path: target.layer for one in names for path, target in targets_of(model, one).items()}
    owners = _owners(model)
    folds = []
    for path, layer in layers.items():
        targets = adapters_alone(path, layer, names)
        if not _writable(layer) and not to_dense:
            raise MergeError(
                f"{path} ({storage_of(layer)}) does not hold a plain dense weight, and merging would quantise it anew; "
                "merge(model, to_dense=True) replaces such layers by dense ones, export_lora leaves the base as it is"
            )
        if not _writable(layer) and _has_own_hooks(layer):
            raise MergeError(f"{path} has hooks or a forward of its own, which a dense layer in its place would lose")
        if hook := hook_in_between(layer):
            raise MergeError(
                f"{path} has a hook that is not ours ({hook}), between the frozen layer and its adapter: merged "
                "weights would compute something else; remove it first, or register it after attach"
            )
        tied = owners.get(id(layer._parameters.get("weight")), [path])
        if len(tied) > 1:
            raise MergeError(
                f"the weight of {path} is also that of {tied[1] if tied[0] == path else tied[0]}: merging "
                "would change both; leave the layer out with exclude_names, or untie them"
            )
        found = adapted_map(path, layer, targets)
        folds.append(_fold(path, layer, found, _dtype(model, layer)))
        if not folds[-1].weight.isfinite().all():
            raise MergeError(
                f"{path} with {listed_variants(targets)} does not fit {folds[-1].weight.dtype}: it overflows"
            )
        if _writable(layer):
            _verify(folds[-1])
    return folds


def _fold(path: str, layer: nn.Module, found: AffineMap, dtype: torch.dtype) -> Fold:
    weight, bias = found.weight.to(dtype), found.bias.to(dtype)
    if is_conv1d(layer):
        weight = weight.T.contiguous()
    if is_convolution(layer):
        weight = weight.reshape(layer.weight.shape)
    return Fold(path, layer, weight, bias if getattr(layer, "bias", None) is not None or bias.any() else None)


def _has_own_hooks(layer: nn.Module) -> bool:
    state = state_of(layer)
    ours = len(state.handles) if state else 0
    return "forward" in vars(layer) or len(layer._forward_hooks) + len(layer._forward_pre_hooks) > ours


def _writable(layer: nn.Module) -> bool:
    """Whether the layer's weight is a plain parameter of floating point that can be put in its place."""
    return storage_of(layer) == "dense" and layer._parameters.get("weight") is not None


def _dtype(model: nn.Module, layer: nn.Module) -> torch.dtype:
    """The weight's, or where that is packed, that of the bias or of the base's first parameter in floating point."""
    held = (getattr(layer, "weight", None), getattr(layer, "bias", None))
    base = (p for path, p in model.named_parameters() if not path.rpartition(".")[2].startswith("lora_"))
    return next((t.dtype for t in (*held, *base) if t is not None and t.is_floating_point()), torch.float32)


def _put(fold: Fold) -> None:
    """The merged weight in the layer, as new parameters."""
    old = fold.layer._parameters["weight"]
    assert old is not None, fold.name
    for kind, value in (("weight", fold.weight), ("bias", fold.bias)):
        if value is not None:
            fold.layer._parameters[kind] = nn.Parameter(value.to(old.device), requires_grad=old.requires_grad)


def _put_back(layer: nn.Module, kept: dict[str, nn.Parameter | None]) -> None:
    """The layer's own parameters, moved where the model has moved meanwhile. May be repeated."""
    held = layer._parameters
    for kind in ("weight", "bias"):
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
    _put(replace(fold, layer=twin))
    weight = fold.weight.T if is_conv1d(fold.layer) else fold.weight.flatten(1)
    x = torch.eye(8, weight.shape[1], dtype=weight.dtype, device=weight.device)
    expected = nn.functional.linear(x, weight, fold.bias)
    got = base_forward(twin, x)
    if got.shape != expected.shape or not torch.allclose(got, expected, rtol=1e-2, atol=1e-6):
        raise MergeError(
            f"{fold.name} ({type(fold.layer).__name__}) computes more than weight times input; it cannot be merged into"
        )


def _replace(model: nn.Module, fold: Fold) -> None:
    d_out, d_in = fold.weight.shape
    dense = nn.Linear(d_in, d_out, bias=fold.bias is not None, device="meta")
    dense.weight = nn.Parameter(fold.weight)
    if fold.bias is not None:
        dense.bias = nn.Parameter(fold.bias)
    dense.train(fold.layer.training)
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is fold.layer:
                setattr(parent, child, dense)


def _owners(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(path)
    return owners
