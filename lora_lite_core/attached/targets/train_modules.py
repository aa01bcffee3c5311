"""Whole modules, or single parameters, that are trained beside an adapter, such as a new classifier or biases: as
copies, so that the base stays.

The copies stand in the modules while the adapter is on and enabled; the base's own tensors wait in its record.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ...contract.config import AdapterConfig
from ...contract.errors import ModelStateError, TargetError, closest, listed
from ...layers.kinds.layer_kinds import is_sharded
from ...layers.shards import copy_shard
from ..layer_hooks.layer_state import state_of
from ..records import Record, Whole, records_of


def trained_paths(model: nn.Module, cfg: AdapterConfig) -> list[str]:
    """The outermost modules that `train_modules` matches, in the model's order, or where a pattern matches none the
    parameters; TargetError when a pattern has neither."""
    if not cfg.train_modules:
        return []
    names = [name for name, _ in model.named_modules() if name]
    parameters = [n for n, _ in model.named_parameters() if not n.rpartition(".")[2].startswith("lora_")]
    found: list[str] = []
    for pattern in cfg.train_modules:
        matched = [name for name in names if re.search(pattern, name)]
        matched = matched or [name for name in parameters if re.search(pattern, name)]
        if not matched:
            near = closest(pattern.strip("^$\\."), [part for name in names for part in name.split(".")])
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise TargetError(f"train_modules: {pattern!r} matches no module and no parameter{hint}")
        found += matched
    order = {name: place for place, name in enumerate((*names, *parameters))}
    return sorted(outermost(dict.fromkeys(found)), key=order.__getitem__)


def outermost(names: Iterable[str]) -> list[str]:
    """Those of the dotted names that are inside no other one."""
    names = list(names)
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def tensors_in(model: nn.Module, paths: Iterable[str]) -> dict[str, Tensor]:
    """The base's parameters and saved buffers in these modules, and these parameters, by their full names."""
    found: dict[str, Tensor] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for path in paths:
        if path in parameters:
            found[path] = parameters[path]
            continue
        module = model.get_submodule(path)
        saved = module.state_dict(keep_vars=True)
        held = (*module.named_parameters(), *module.named_buffers())
        own = {f"{path}.{name}": tensor for name, tensor in held if name in saved}
        if not any(isinstance(tensor, nn.Parameter) for tensor in own.values()):
            raise TargetError(f"train_modules: {path} ({type(module).__name__}) has no parameter to train")
        found |= own
    return found


def check_trainable(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise TargetError or ModelStateError for tensors of which no trainable copy can stand in their place. A bias may,
    beside an adapter on its layer."""
    for path in dict.fromkeys(name.rpartition(".")[0] for name in tensors if not name.endswith("bias")):
        for name, inner in model.get_submodule(path).named_modules(prefix=path):
            if state_of(inner) is not None:
                raise TargetError(f"train_modules: {name} carries an adapter; train it whole or adapt it, not both")
    for name, tensor in tensors.items():
        if tensor.device.type == "meta":
            raise ModelStateError(f"train_modules: {name} is on the meta device; load the base's weights first")
        plain = type(tensor) is nn.Parameter and tensor.is_floating_point()
        if isinstance(tensor, nn.Parameter) and not plain:
            kind = f"{type(tensor).__name__} of {tensor.dtype}"
            raise TargetError(f"train_modules: {name} is a {kind}, which cannot be trained")
    owners = [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)] if tensors else []
    for name, tensor in tensors.items():
        if shared := [other for other, key in owners if key == id(tensor) and other != name]:
            raise TargetError(
                f"train_modules: {name} is also {shared[0]}, which would no longer be tied to it; untie them first: "
                "give one of the two a copy, torch.nn.Parameter(weight.detach().clone())"
            )


def whole_copies(model: nn.Module, cfg: AdapterConfig) -> dict[str, Whole]:
    """What a new adapter with this config trains whole."""
    tensors = tensors_in(model, trained_paths(model, cfg))
    check_trainable(model, tensors)
    return {name: Whole.trained_from(tensor, tensor) for name, tensor in tensors.items()}


def put_trained(model: nn.Module, record: Record) -> None:
    """The trained copies in their places. May be repeated."""
    for name, whole in record.whole.items():
        if whole.shard is not None:
            _shard(tensor_at(model, name)).copy_(whole.shard)
            whole.shard = None
            continue
        if whole.trained is not None and is_sharded(tensor_at(model, name)):
            raise ModelStateError(f"{name} was put in shards while its adapter was not active; activate it before")
        if whole.trained is not None and place(model, name, whole.trained) is not None:
            whole.trained = None


def put_base(model: nn.Module, record: Record) -> None:
    """The base's own tensors in their places, while the trained copies wait in the record. May be repeated."""
    for name, whole in record.whole.items():
        if is_sharded(held := tensor_at(model, name)):  # FSDP2 has taken the place: values change, not tensors
            if whole.shard is None and whole.trained is None:
                whole.shard = _shard(held).clone()
                copy_shard(held.detach(), whole.base)
            continue
        if whole.trained is None:
            whole.trained = held
        if held is whole.trained:  # and not that of another adapter
            place(model, name, whole.base)


def _shard(tensor: Any) -> Tensor:
    """This process's part of a sharded tensor; writes to it are not recorded."""
    local: Tensor = tensor.detach().to_local()
    return local


def place(model: nn.Module, name: str, tensor: Tensor) -> Tensor | None:
    """Put the tensor in the place of that full name, moved to the device and dtype of what was there, and return what
    stands there now; None where the user has removed the place."""
    old = tensor_at(model, name)
    if old is None or old is tensor:
        return old
    if (tensor.device, tensor.dtype) != (old.device, old.dtype):
        moved = tensor.detach().to(old.device, old.dtype)
        tensor = nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    held = module._parameters if attribute in module._parameters else module._buffers
    held[attribute] = tensor  # type: ignore[assignment]
    return tensor


def tensor_at(model: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer of that full name; None where there is none any more."""
    path, _, attribute = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    found = module._parameters.get(attribute)
    return found if found is not None else module._buffers.get(attribute)


def current(model: nn.Module, record: Record) -> dict[str, Tensor]:
    """The trained tensors by full name, in their places or not; ModelStateError when the user has removed one, or when
    it waits outside of a sharded place."""
    if waiting := [name for name, whole in record.whole.items() if whole.shard is not None]:
        raise ModelStateError(f"{waiting[0]} is in shards, and the base's is in its place; activate its adapter first")
    held = record.whole.items()
    found = {name: tensor_at(model, name) if whole.trained is None else whole.trained for name, whole in held}
    if gone := [name for name, tensor in found.items() if tensor is None]:
        raise ModelStateError(f"{listed(gone, 3)}, trained whole by an adapter, was removed from the model since")
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def check_untrained(model: nn.Module, names: Iterable[str]) -> None:
    """Raise TargetError when one of these tensors or layers is trained whole by another adapter that acts: one head for
    each task has its place while its adapter is active."""
    acting = records_of(model).lasting
    for name in names:
        for other, record in records_of(model).adapters.items():
            inside = [key for key in record.whole if key.startswith(f"{name}.") and key != f"{name}.bias"]
            if (name in record.whole and other in acting) or inside:
                raise TargetError(
                    f"{name} is trained whole by adapter '{other}' already (its train_modules)"
                    + ("" if inside else "; for one of each, switch that one off first: activate(model)")
                )
