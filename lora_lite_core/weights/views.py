"""The model as it answers without its adapters, or with some of them as they are now: a module of its own that shares
the base's parameters, for a reference beside a model in training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..attached.adapter import Adapter
from ..attached.layer_hooks.layer_state import STATE, state_of
from ..attached.layer_hooks.putting import add_target
from ..attached.model_checks import check_not_sharded
from ..attached.model_hooks.wanted import add_hooks
from ..attached.records import RECORDS, Record, check_one_owner, check_outside, names_of, record_of, records_of
from ..attached.targets.train_modules import put_base
from ..attached.tensors.placing import remove_tensors
from ..contract.errors import ModelStateError
from ..contract.target import Target
from ..layers.rollback import SAVING
from ..layers.twins import Twins

Model = TypeVar("Model", bound=nn.Module)


def reference_view(model: Model, adapter: str | Iterable[str] | None = None) -> Model:
    """The model with its adapters off, as a module beside it that has the same parameters: no second model in memory.
    The reference of DPO and GRPO.

    adapter  None; or the name of an adapter, or several, that act in the view as they are now: their tensors are copied
             and frozen, so that the view stays the same when they are trained on (the reference of an adapter that
             continues another training)

    It is of the model's class, with all that belongs to it (`base_model`, `get_decoder()`, `config`, `generate`), in
    eval mode. Unlike `disabled` it leaves the model alone: other threads may run either. It sees what is written to
    the base's weights and where they are moved, not what is attached or detached later. Make it before the model is
    sharded or compiled. Raises AdapterNameError, ModelStateError.
    """
    names = [adapter] if isinstance(adapter, str) else list(adapter or ())
    names_of(model, None)  # there is one
    for name in names:
        if not record_of(model, name).ready:
            raise ModelStateError(
                f"adapter '{name}' has no values yet; call adapters(model)['{name}'].initialize() first"
            )
    check_one_owner(model)
    check_outside(model, "merged", *(("disabled",) if names else ()))
    check_not_sharded(model, "make the view before the model is sharded")
    twins = Twins()
    _share(model, names, twins)
    view = twins.of(model)
    _strip(view, names)
    return view


def _share(model: nn.Module, names: list[str], twins: Twins) -> None:
    """Have the view hold the model's own parameters, and copies of what these adapters consist of."""
    for parameter in model.parameters():
        twins.share(parameter, parameter)
    for record in records_of(model).adapters.values():
        for whole in record.whole.values():
            twins.share(whole.base, whole.base)
    for name in names:
        for _, tensor in Adapter(model, name).named_tensors():
            copy = tensor.detach().clone()
            twins.share(tensor, nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy)


def _strip(view: nn.Module, names: list[str]) -> None:
    """Take the adapters off the view, into which they were copied with the rest, and put these on again: the handles
    that were copied still mean the model's hooks."""
    records = records_of(view)
    _remove_hooks(view, records.handles)
    for name in SAVING:
        if name in records.handles:
            records.handles[name].remove()
    kept: dict[str, list[Target]] = {name: [] for name in names}
    for module in view.modules():
        state = state_of(module)
        if state is None:
            continue
        _remove_hooks(module, state.handles)
        delattr(module, STATE)
        for target in state.targets:
            if target.adapter in kept:
                kept[target.adapter].append(target)
            else:
                remove_tensors(target)
    vars(view).pop(RECORDS)
    for name, record in records.adapters.items():
        if name in kept:
            _put(view, name, record, kept[name])
            continue
        put_base(view, record)
        for attribute in record.shared:
            delattr(view, attribute)


def _remove_hooks(module: nn.Module, handles: Mapping[str, Any]) -> None:
    """Those of the module that these handles name, which mean another one."""
    ids = [handle.id for handle in handles.values() if isinstance(handle, RemovableHandle)]
    for name, held in vars(module).items():
        if "_hooks" in name and isinstance(held, dict):
            for key in ids:
                held.pop(key, None)


def _put(view: nn.Module, name: str, record: Record, targets: list[Target]) -> None:
    """Have an adapter whose tensors are on the view act there."""
    record.follower, record.versions = None, None
    order = {path: place for place, path in enumerate(record.layers)}
    for target in sorted(targets, key=lambda target: order[target.name]):
        target.calls = None
        add_target(target)
    add_hooks(view, record, targets)
    records = records_of(view)
    vars(view)[RECORDS] = replace(records, adapters={**records.adapters, name: record})
