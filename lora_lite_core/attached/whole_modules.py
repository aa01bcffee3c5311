"""Whole modules that are trained beside an adapter, such as a new classifier: as copies, so that the base stays.

The copies stand in the modules while the adapter is on and enabled; the base's own tensors wait in its record.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from ..contract.config import AdapterConfig
from ..contract.errors import ModelStateError, TargetError, closest
from .forward_hooks import state_of


def trained_paths(model: nn.Module, cfg: AdapterConfig) -> list[str]:
    """The outermost modules that `train_modules` matches, in the model's order; TargetError when a pattern has none."""
    if not cfg.train_modules:
        return []
    names = [name for name, _ in model.named_modules() if name]
    for pattern in cfg.train_modules:
        if not any(re.search(pattern, name) for name in names):
            near = closest(pattern.strip("^$\\."), [part for name in names for part in name.split(".")])
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise TargetError(f"train_modules: {pattern!r} matches no module{hint}")
    matched = [name for name in names if any(re.search(pattern, name) for pattern in cfg.train_modules)]
    return [name for name in matched if not any(name.startswith(f"{other}.") for other in matched)]


def is_inside(name: str, paths: list[str]) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def trained_tensors(model: nn.Module, cfg: AdapterConfig) -> dict[str, Tensor]:
    """The base's parameters and buffers in those modules by their full names, checked to be fit for training."""
    found: dict[str, Tensor] = {}
    for path in trained_paths(model, cfg):
        module = model.get_submodule(path)
        for name, inner in module.named_modules(prefix=path):
            if state_of(inner) is not None:
                raise TargetError(f"train_modules: {name} carries an adapter; train it whole or adapt it, not both")
        saved = module.state_dict(keep_vars=True)
        held = (*module.named_parameters(), *module.named_buffers())
        own = {f"{path}.{name}": tensor for name, tensor in held if name in saved}
        if not any(isinstance(tensor, nn.Parameter) for tensor in own.values()):
            raise TargetError(f"train_modules: {path} ({type(module).__name__}) has no parameter to train")
        for name, tensor in own.items():
            if tensor.device.type == "meta":
                raise ModelStateError(f"train_modules: {name} is on the meta device; load the base's weights first")
            plain = type(tensor) is nn.Parameter and tensor.is_floating_point()
            if isinstance(tensor, nn.Parameter) and not plain:
                kind = f"{type(tensor).__name__} of {tensor.dtype}"
                raise TargetError(f"train_modules: {name} is a {kind}, which cannot be trained")
        found |= own
    if not found:
        return found
    owners = [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]
    for name, tensor in found.items():
        if shared := [other for other, key in owners if key == id(tensor) and other != name]:
            raise TargetError(f"train_modules: {name} is also {shared[0]}, which would no longer be tied to it")
    return found


def put_copies(model: nn.Module, originals: Mapping[str, Tensor], values: Mapping[str, Tensor] | None) -> None:
    """Trainable copies in the originals' place, with the values of a file where there are some."""
    copies: dict[str, Tensor] = {}
    for name, tensor in originals.items():
        copy = tensor.detach().clone()
        if values is not None:
            copy.copy_(values[name])
        copies[name] = nn.Parameter(copy) if isinstance(tensor, nn.Parameter) else copy
    swap(model, copies)


def swap(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put these in place, and return what was there. A tensor moves to the device and dtype of the one it replaces."""
    before: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        path, _, attribute = name.rpartition(".")
        try:
            module = model.get_submodule(path)
        except AttributeError:  # the user has removed it
            continue
        held = module._parameters if attribute in module._parameters else module._buffers
        old = held.get(attribute)
        if old is None:
            continue
        before[name] = old
        if (tensor.device, tensor.dtype) != (old.device, old.dtype):
            moved = tensor.detach().to(old.device, old.dtype)
            tensor = nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
        held[attribute] = tensor  # type: ignore[assignment]
    return before


def current(model: nn.Module, originals: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that are in these places now: the trained ones, outside of disabled()."""
    places = {name: name.rpartition(".") for name in originals}
    return {name: getattr(model.get_submodule(path), attribute) for name, (path, _, attribute) in places.items()}


def check_untrained(names: Iterable[str], whole: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise TargetError when one of these tensors or layers is trained whole by another adapter, given by its name."""
    for name in names:
        for other, originals in whole.items():
            if name in originals or any(key.startswith(f"{name}.") for key in originals):
                raise TargetError(f"{name} is trained whole by adapter '{other}' already (its train_modules)")
