"""Is this the base model that an adapter was made on? Fingerprints are taken at attach, and compared at load and when
the base's weights are loaded anew under an adapter."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...contract.errors import BaseMismatch, listed
from ...contract.target import Target
from ...contract.text import count
from ...layers.kinds.layer_kinds import is_sharded
from ...layers.weight_sketch import sketch_distance, sketch_tolerance
from ..model_checks import Reaction
from ..records import record_of, records_of, targets_of
from ..targets.experts import storage_now
from ..tensors.declared import specs_for, take_fingerprint, weight_version
from ..tensors.made import copy_values, make_tensors

Saved = Mapping[str, tuple["list[float] | None", str]]  # by target: fingerprint and storage then


def check_base(what: str, targets: Iterable[Target], saved: Saved, reaction: Reaction) -> None:
    """Compare fingerprints of before (`what` was made on) with those of the layers now."""
    far: list[tuple[float, float, str]] = []
    across: set[tuple[str, str]] = set()
    for target in targets if reaction != "ignore" else ():
        fingerprint, storage = saved[target.name]
        now = take_fingerprint(target) if fingerprint else None
        if fingerprint is None or now is None:
            continue
        storages = storage, storage_now(target)
        distance = sketch_distance(torch.tensor(fingerprint), torch.tensor(now))
        if not distance <= (allowed := sketch_tolerance(*storages)):
            far.append((distance, allowed, target.name))
        elif storages[0] != storages[1]:
            across.add(storages)
    if far:
        distance, allowed, name = max(far)
        message = (
            f"{what} was made on another base model: {name} differs by {distance:.2g} of its RMS "
            f"(allowed {allowed}), {len(far)} of {count(len(saved), 'layer')} in all\n"
            "  load it on the model it was trained on; on_base_mismatch='warn' loads it all the same"
        )
        if reaction == "error":
            raise BaseMismatch(message)
        warnings.warn(message, stacklevel=3)
    for before, after in sorted(across):
        warnings.warn(
            f"{what} was trained on {before} weights and is opened on {after} ones: "
            "another model would be noticed, a fine-tune of the same one would not",
            stacklevel=3,
        )


def refresh(model: nn.Module, name: str, reaction: Reaction) -> list[str]:
    """Take again what an adapter has from its base (see `Adapter.refresh`); the names of the layers that changed."""
    targets = targets_of(model, name)
    saved = {path: (target.fingerprint, target.storage) for path, target in targets.items()}
    check_base(f"adapter '{name}'", targets.values(), saved, reaction)
    changed = {path: new for path, target in targets.items() if (new := _changes(model, target))}
    for path, new in changed.items():
        copy_values(new, targets[path].params_on(targets[path].layer))
    for target in targets.values():
        target.fingerprint, target.storage = take_fingerprint(target), storage_now(target)
        target.base_version = weight_version(target.layer, target.part)
    return list(changed)


def watch_base(model: nn.Module) -> Any:
    """The handle of a hook that notices `model.load_state_dict` under an adapter."""
    return model.register_load_state_dict_post_hook(_after_loading)


def _after_loading(model: nn.Module, _: Any) -> None:
    """Warn when what an adapter took from the base does not fit the weights that have been loaded."""
    for name, record in records_of(model).adapters.items():
        if record.ready:
            warn_if_stale(model, name, stacklevel=5)


def warn_if_stale(model: nn.Module, name: str, *, stacklevel: int) -> None:
    """Warn when weights of the base were written since the adapter was put on, and what it has from them is not true
    any more. Only layers whose weight torch has counted a write to (or that were copied, or moved) are looked at, and
    not in shards, where that would take all processes."""
    stale: list[str] = []
    for path, target in targets_of(model, name).items():
        if any(is_sharded(parameter) for parameter in target.layer._parameters.values()):
            continue
        if target.base_version != (version := weight_version(target.layer, target.part)):
            if _is_stale(model, target):
                stale.append(path)
            else:
                target.base_version = version
    if stale:
        warnings.warn(
            f"adapter '{name}' was made on other weights of {count(len(stale), 'layer')} ({listed(stale, 3)}) than "
            f"those that are there now; type adapters(model)['{name}'].refresh(), or detach it, load the base, and "
            "attach it then",
            stacklevel=stacklevel,
        )


def _is_stale(model: nn.Module, target: Target) -> bool:
    now = take_fingerprint(target) if target.fingerprint else None
    if target.fingerprint is not None and now is not None:
        distance = sketch_distance(torch.tensor(target.fingerprint), torch.tensor(now))
        if not distance <= sketch_tolerance(target.storage, storage_now(target)):
            return True
    return bool(_changes(model, target))


def _changes(model: nn.Module, target: Target) -> dict[str, Tensor]:
    """The tensors that are not saved but made of the base, where they come out another way now."""
    if len(target.saved) == len(target.attributes):
        return {}
    params, specs = target.params_on(target.layer), specs_for(target)
    saved = {bare: params[bare].detach() for bare in target.saved}
    own = {bare: specs[bare] for bare in target.attributes}
    shared = {bare: params[bare] for bare in target.shared}
    made = make_tensors(target, own, record_of(model, target.adapter).seed, saved, shared)
    new = {bare: made[bare] for bare in own if bare not in saved}
    return new if any(not torch.allclose(new[b], params[b], rtol=3e-3, atol=1e-6) for b in new) else {}
