"""Folding adapters into the base's weights, for good or for a while."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..attached.attach_detach import uninstall
from ..attached.records import all_or_nothing, check_outside, names_of, present_targets, record_of, targets_of
from ..attached.switching.activity import Block, acting_on, enter, leave, without
from ..attached.targets.train_modules import current, place, tensor_at
from ..contract.errors import AdapterNameError, ModelStateError
from .folds import Fold, folds_of, put, put_back, writable


def merge(model: nn.Module, name: str | None = None, *, to_dense: bool = False) -> None:
    """Fold one adapter, or all that are active (None), into the weights, and take it off: the model computes the same
    without.

    to_dense  replace layers whose weight is quantised or computed by plain nn.Linear ones that hold the merged weight

    Works for every variant that is affine in x: the adapted layer is probed in float64 and rounded once, to the
    weight's dtype. The weights become new parameters; a bias is added where the adapter shifts a layer without one.
    Others may stay where what they add does not depend on it, which is measured. All layers are computed before one is
    changed.

    Raises MergeError for layers that are not dense (without to_dense), tied weights, adapters that are not affine (with
    the measured residual) or not finite; AdapterNameError; ModelStateError for compiled, sharded or meta models.
    """
    check_outside(model)
    names = acting_names(model, name)
    folds = folds_of(model, names, to_dense, for_good=True)
    with all_or_nothing(model):
        trained = {key: tensor for one in names for key, tensor in current(model, record_of(model, one)).items()}
        uninstall(model, names)
        for key, tensor in trained.items():  # what was trained whole stays
            base = tensor_at(model, key)
            tensor.requires_grad = base is not None and base.requires_grad
            place(model, key, tensor)
        for fold in folds:
            if fold.names[0] != "weight" or writable(fold.layer):
                put(fold)
            else:
                _replace(model, fold)


@contextmanager
def merged(model: nn.Module, name: str | None = None) -> Generator[None]:
    """Inside, one adapter, or all that are active (None), is folded into the weights and switched off, which makes
    forward passes as fast as the base's; after it the model holds its own parameters again, which were never written.
    For the whole process, as `disabled`; what is loaded or copied inside would be lost or wrong, and is refused.

    Raises what `merge` does.
    """
    names = acting_names(model, name)
    folds = folds_of(model, names, to_dense=False)
    kept = [dict(fold.layer._parameters) for fold in folds]
    block, handles = Block("merged", without(names, whole_stays=True)), list[Any]()
    try:
        try:
            handles.append(model.register_load_state_dict_pre_hook(_refuse_loading))
            for one in names:
                for target in targets_of(model, one).values():
                    target.folded = True
            enter(model, block)
            for fold in folds:
                put(fold)
            yield
        finally:  # twice, so that an interrupt in the first is made good by the second
            _leave(model, names, block, folds, kept, handles)
    finally:
        _leave(model, names, block, folds, kept, handles)


def acting_names(model: nn.Module, name: str | None) -> list[str]:
    """The one adapter, or for None all that are active; AdapterNameError where there is none."""
    names = names_of(model, name)
    if name is not None:
        return names
    acting = [*acting_on(model).names]
    if not acting:
        raise AdapterNameError(f"no adapter is active; type activate(model, '{names[0]}'), or give a name")
    return acting


def _leave(
    model: nn.Module,
    names: Sequence[str],
    block: Block,
    folds: Sequence[Fold],
    kept: Sequence[dict[str, nn.Parameter | None]],
    handles: Sequence[Any],
) -> None:
    """Out of `merged`: the layers' own parameters are back, and the adapters run. May be repeated."""
    for handle in handles:
        handle.remove()
    for fold, parameters in zip(folds, kept, strict=True):
        put_back(fold, parameters)
    for one in names:
        for target in present_targets(model, one).values():
            if target is not None:
                target.folded = False
    leave(model, block)


def _refuse_loading(*_: Any) -> None:
    raise ModelStateError(
        "load_state_dict inside `with merged(model)`: what is loaded would be gone after it; leave that block first"
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
