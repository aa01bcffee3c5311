"""Folding adapters into the base's weights, for good or for a while."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attached.adapter import detach, disabled
from ..attached.forward_hooks import state_of
from ..attached.model_checks import check_attachable
from ..attached.records import inside, names_of, record_of
from ..attached.whole_modules import current, swap
from ..contract.errors import MergeError
from ..layers.kinds import is_conv1d, storage_of
from ..layers.weight import base_forward
from .affine_map import AffineMap, adapted_map, entries_on, listed_variants


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
    folds = _folds(model, names_of(model, name), to_dense)
    for one in names_of(model, name):
        trained = current(model, record_of(model, one).originals)
        detach(model, one)
        for key, base in swap(model, trained).items():  # what was trained whole stays
            trained[key].requires_grad_(base.requires_grad)
    for fold in folds:
        if _writable(fold.layer):
            _swap(fold)
        else:
            _replace(model, fold)


@contextmanager
def merged(model: nn.Module, name: str | None = None) -> Generator[None]:
    """Inside, one adapter, or all of them (None), is folded into the weights and switched off, which makes forward
    passes as fast as the base's; after it the model holds its own parameters again, which were never written.

    Raises what `merge` does.
    """
    folds = _folds(model, names_of(model, name), to_dense=False)
    with ExitStack() as stack:
        trained = [current(model, record_of(model, one).originals) for one in names_of(model, name)]
        stack.enter_context(disabled(model, name))
        for tensors in trained:  # what was trained whole stays
            base = swap(model, tensors)
            stack.callback(swap, model, base)
        for fold in folds:
            stack.enter_context(_swapped(fold))
        stack.enter_context(inside(model, "merged"))
        yield


def _folds(model: nn.Module, names: list[str], to_dense: bool) -> list[Fold]:
    check_attachable(model)
    targets = dict.fromkeys(layer for one in names for layer in record_of(model, one).targets)
    owners = _owners(model)
    folds = []
    for path in targets:
        layer = model.get_submodule(path)
        entries = entries_on(path, layer, names)
        if not _writable(layer) and not to_dense:
            raise MergeError(
                f"{path} ({storage_of(layer)}) does not hold a plain dense weight, and merging would quantise it anew; "
                "merge(model, to_dense=True) replaces such layers by dense ones, export_lora leaves the base as it is"
            )
        if not _writable(layer) and _has_own_hooks(layer):
            raise MergeError(f"{path} has hooks or a forward of its own, which a dense layer in its place would lose")
        tied = owners.get(id(layer._parameters.get("weight")), [path])
        if len(tied) > 1:
            raise MergeError(
                f"the weight of {path} is also that of {tied[1] if tied[0] == path else tied[0]}: merging "
                "would change both; leave the layer out with exclude_names, or untie them"
            )
        found = adapted_map(path, layer, entries)
        folds.append(_fold(path, layer, found, _dtype(model, layer)))
        if not folds[-1].weight.isfinite().all():
            raise MergeError(
                f"{path} with {listed_variants(entries)} does not fit {folds[-1].weight.dtype}: it overflows"
            )
        if _writable(layer):
            _verify(folds[-1])
    return folds


def _fold(path: str, layer: nn.Module, found: AffineMap, dtype: torch.dtype) -> Fold:
    weight, bias = found.weight.to(dtype), found.bias.to(dtype)
    if is_conv1d(layer):
        weight = weight.T.contiguous()
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


def _swap(fold: Fold) -> None:
    old = fold.layer._parameters["weight"]
    assert old is not None, fold.name
    for kind, value in (("weight", fold.weight), ("bias", fold.bias)):
        if value is not None:
            fold.layer._parameters[kind] = nn.Parameter(value.to(old.device), requires_grad=old.requires_grad)


@contextmanager
def _swapped(fold: Fold) -> Generator[None]:
    held = fold.layer._parameters
    kept = {kind: held[kind] for kind in ("weight", "bias") if kind in held}
    _swap(fold)
    try:
        yield
    finally:
        for kind in ("weight", "bias"):
            old, now = kept.get(kind), held.pop(kind, None)
            if old is not None and now is not None and (old.device, old.dtype) != (now.device, now.dtype):
                old = nn.Parameter(old.detach().to(now.device, now.dtype), old.requires_grad)  # the model has moved
            if kind in kept:
                held[kind] = old


@torch.no_grad()
def _verify(fold: Fold) -> None:
    """Run the layer on the new weight: a class whose forward does more than multiply would show here."""
    with _swapped(fold):
        weight = fold.weight.T if is_conv1d(fold.layer) else fold.weight
        x = torch.eye(8, weight.shape[1], dtype=weight.dtype, device=weight.device)
        expected = nn.functional.linear(x, weight, fold.bias)
        got = base_forward(fold.layer, x)
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
