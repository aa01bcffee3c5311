"""What is seen of training at the model: that no optimizer is followed, that shared tensors are not sharded."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from ...contract.errors import ModelStateError, listed
from ...layers.kinds.layer_kinds import is_a
from ..records import present_targets, record_of, records_of

REMINDER = (
    "acts before every optimizer step, and was trained without: call ll.follow(model, optimizer) once, after the "
    "optimizer is made"
)


def _written(model: nn.Module, name: str) -> int:
    """Torch's count of writes to what the adapter trains."""
    targets = (target for target in present_targets(model, name).values() if target is not None)
    return sum(t._version for target in targets for t in target.params.values() if t.requires_grad)


def remind(model: nn.Module, name: str, *, stacklevel: int) -> None:
    """Warn when an adapter that acts before every optimizer step has changed since a forward pass in training mode, and
    no optimizer is followed."""
    record = record_of(model, name)
    if record.follower is None and record.versions not in (None, _written(model, name)):
        warnings.warn(f"adapter '{name}' ({record.variant.name}) {REMINDER}", stacklevel=stacklevel)
        record.reminded = True


def remind_to_follow(model: nn.Module, *_: Any) -> None:
    """A forward pre-hook of the model: warns once, at the first training step after one that was not followed."""
    if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
        return
    for name, record in records_of(model).adapters.items():
        if record.variant.before_step is not None and record.ready:
            if not record.reminded:
                remind(model, name, stacklevel=4)
            record.versions = _written(model, name)


def refuse_half_sharded(model: nn.Module, *_: Any) -> None:
    """A forward pre-hook of a model on which layers share trained tensors: FSDP2 would not reduce their gradients."""
    if torch.compiler.is_compiling() or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if not is_a(model, "FSDPModule") and any(is_a(module, "FSDPModule") for module in model.modules()):
        shared = [one for record in records_of(model).adapters.values() for one in record.shared]
        raise ModelStateError(
            f"parts of the model are sharded and the {type(model).__name__} itself is not, which holds "
            f"{listed(shared, 3)} for several layers: its gradient would not be reduced; shard the model, too: "
            "fully_shard(model)"
        )
