"""Putting one adapter on a model, whole or not at all; switching it off and on; taking it off."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from ..contract.target import Target
from ..layers.shards import is_in_shards, reshard
from .layer_hooks.layer_state import targets_on
from .layer_hooks.putting import add_target, remove_target
from .model_checks import check_lookups
from .model_hooks.wanted import add_hooks
from .records import (
    RECORDS,
    Record,
    all_or_nothing,
    let_pack,
    present_targets,
    records_of,
)
from .tensors.declared import take_fingerprint, weight_version
from .tensors.placing import Making, remove_tensors

Values = Mapping[str, Mapping[str, Tensor]]  # by target and bare name


def install(
    model: nn.Module,
    name: str,
    record: Record,
    targets: Iterable[Target],
    *,
    values: Values | None = None,
    calibration_data: Any = None,
    trainable: bool = True,
) -> None:
    """Put an adapter on these targets: with the `values` of a file, or new ones, which wait for `Adapter.initialize`
    where the record is not ready. One of the same name that has been waiting makes room. The model is as before if
    anything fails; in shards the waiting one's tensors are filled."""
    targets = list(targets)
    if name in records_of(model).adapters and is_in_shards(model):
        from .tensors.sharded import fill_shards

        fill_shards(model, name, values, calibration_data)
        return
    if any(other.whole for other in records_of(model).adapters.values()):
        from .targets.train_modules import check_untrained

        check_untrained(model, (*record.whole, *(target.name for target in targets)))
    unpacking = _unpacking(model)
    with all_or_nothing(model, undo=unpacking.undo):
        unpacking.apply()
        if name in records_of(model).adapters:
            take_off(model, name)
        making = Making(model, record.seed)
        for target in targets:
            making.place(target, None if values is None else values[target.name], ready=record.ready)
        if values is None and record.ready:
            making.run_group_init(model, record, calibration_data)
        check_lookups(making.placed if record.ready else ())
        _commit(model, name, record, list(making.placed), trainable)
        records = records_of(model)
        vars(model)[RECORDS] = replace(records, unpacked=(*records.unpacked, *unpacking.names))


def uninstall(model: nn.Module, names: Sequence[str]) -> None:
    """Take these adapters off; with the last one everything else that `install` has done is undone, too."""
    with all_or_nothing(model):
        for name in names:
            take_off(model, name)
        if not records_of(model).adapters:
            _release(model)


def take_off(model: nn.Module, name: str) -> None:
    """Hooks, tensors and record of one adapter. To be used inside an all_or_nothing block."""
    for target in present_targets(model, name).values():
        if target is not None:
            remove_target(target.layer, name)
            remove_tensors(target)
    records = records_of(model)
    for attribute in [one for one in records.adapters[name].shared if hasattr(model, one)]:
        delattr(model, attribute)
    _put_whole(model, records.adapters[name], trained=False)
    left = {other: record for other, record in records.adapters.items() if other != name}
    chosen = None if records.chosen is None else tuple(one for one in records.chosen if one != name)
    strengths = {other: strength for other, strength in records.strengths.items() if other != name}
    vars(model)[RECORDS] = replace(records, adapters=left, chosen=chosen, strengths=strengths)


def _commit(model: nn.Module, name: str, record: Record, targets: Sequence[Target], trainable: bool) -> None:
    """From here on the adapter runs, what is not an adapter is frozen, and the model remembers."""
    first = RECORDS not in vars(model)
    record.layers = tuple(target.name for target in targets)
    record.shared = tuple({shared.attribute: None for target in targets for shared in target.shared.values()})
    for target in targets:
        target.ready, target.placing = record.ready, None
        if record.ready:
            target.fingerprint = take_fingerprint(target)
            target.base_version = weight_version(target.layer, target.part)
        add_target(target)
    add_hooks(model, record, targets)
    records = records_of(model)
    chosen = None if records.chosen is None else (*records.chosen, name)
    vars(model)[RECORDS] = replace(records, adapters={**records.adapters, name: record}, chosen=chosen)
    _freeze(model, record, first)
    made = [tensor for target in targets for tensor in target.params.values()]
    made += [whole.trained for whole in record.whole.values() if whole.trained is not None]
    for tensor in () if trainable else made:
        tensor.requires_grad = False
    _put_whole(model, record, trained=True)


def _put_whole(model: nn.Module, record: Record, *, trained: bool) -> None:
    """What is trained whole in its places, or what the base has there. May be repeated."""
    if record.whole:
        from .targets.train_modules import put_base, put_trained

        reshard(model)
        (put_trained if trained else put_base)(model, record)


def _freeze(model: nn.Module, record: Record, first: bool) -> None:
    """Turn off what is not an adapter's, and note it. Only the first adapter does this for the whole model: what the
    user has turned on again since stays on. Of what an adapter trains whole, the base's own tensors are turned off."""
    records, frozen = records_of(model), []
    for name, whole in record.whole.items():
        if whole.base.requires_grad:
            whole.base.requires_grad = False
            frozen.append(name)
    if first:
        ours = {id(p) for module in model.modules() for target in targets_on(module) for p in target.params.values()}
        for name, parameter in model.named_parameters():
            if id(parameter) not in ours and name not in record.whole and parameter.requires_grad:
                parameter.requires_grad = False
                frozen.append(name)
    vars(model)[RECORDS] = replace(records, frozen=(*records.frozen, *frozen))


def _release(model: nn.Module) -> None:
    """What the first `install` has turned off is turned on again, and nothing of ours stays on the model."""
    records = records_of(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in records.frozen:
        if name in parameters:
            parameters[name].requires_grad = True
    for handle in records.handles.values():
        handle.remove()
    let_pack(model, records.unpacked, True)
    vars(model).pop(RECORDS)


def _unpacking(model: nn.Module) -> Any:
    """What keeps 4-bit layers as they are while adapters are on the model; nothing to do where there can be none."""
    if "bitsandbytes" not in sys.modules:
        return SimpleNamespace(names=(), apply=lambda: None, undo=lambda: None)
    from ..layers.four_bit_packing import Unpacking

    return Unpacking(model)
