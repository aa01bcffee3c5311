"""Which hooks of the whole model an adapter needs; the modules that hold them are imported for those alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ...contract.target import Target
from ...layers.rollback import SAVING
from ..records import RECORDS, Record, records_of


def add_hooks(model: nn.Module, record: Record, targets: Sequence[Target]) -> None:
    """Put those on the model that are not there already, and note them."""
    records = records_of(model)
    handles: dict[str, Any] = dict(records.handles)
    wanted = _wanted(record, targets)
    if wanted["base"] and "base" not in handles:
        from .base_check import watch_base

        handles["base"] = watch_base(model)
    if wanted["steps"] and "steps" not in handles:
        from .training import remind_to_follow

        handles["steps"] = model.register_forward_pre_hook(remind_to_follow)
    if wanted["sharding"] and "sharding" not in handles:
        from .training import refuse_half_sharded

        handles["sharding"] = model.register_forward_pre_hook(refuse_half_sharded)
    if SAVING[0] not in handles and hasattr(type(model), SAVING[0]):
        from .saving import put_savers

        handles |= put_savers(model)
    if wanted["calls"]:
        from .calls import begin_call, calls_of, end_call

        calls = records.calls or calls_of(model)
        for target in targets:
            target.calls = calls
        if "calls" not in handles:
            handles["calls"] = model.register_forward_pre_hook(begin_call, prepend=True, with_kwargs=True)
            handles["after calls"] = model.register_forward_hook(end_call, with_kwargs=True, always_call=True)
        records = replace(records, calls=calls)
    vars(model)[RECORDS] = replace(records, handles=handles)


def _wanted(record: Record, targets: Sequence[Target]) -> Mapping[str, bool]:
    shared = [one.held[one.attribute] for target in targets for one in target.shared.values()]
    return {
        "base": any(target.fingerprint or len(target.saved) < len(target.attributes) for target in targets),
        "steps": record.variant.before_step is not None,
        "sharding": any(tensor.requires_grad for tensor in shared),
        "calls": record.variant.asks("context"),
    }
