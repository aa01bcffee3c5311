"""Putting a model back as it was, when a call that changes it fails or is interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import BuiltinFunctionType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

OURS = "_lora_lite"  # what the library's own attributes of a module begin with
SAVING = ("save_pretrained", "save")  # and methods that an adapted model may have of its own
_HELD = (
    "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)  # fmt: skip


class Modes:
    """Whether this thread records gradients and is in autocast, to be put back when a call fails: an interrupt while a
    with-block is being left, a variant's as well as ours, would leave the process in it."""

    def __init__(self) -> None:
        kinds = {"cpu", (torch.accelerator.current_accelerator() or torch.device("cpu")).type}
        known = [kind for kind in kinds if torch.amp.is_autocast_available(kind)]
        self._autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in known]
        self._grad, self._depth = torch.is_grad_enabled(), _autocast_depth()

    def restore(self) -> None:
        torch.set_grad_enabled(self._grad)
        for kind, enabled, dtype in self._autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        for _ in range(_autocast_depth() - self._depth):
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()


class AllOrNothing:
    """A with-block that changes a model: when it fails or is interrupted, at whatever line, the model is as before.

    Covers what the library changes: parameters, buffers, submodules and hooks in their places and order, flags, modes,
    our own records; not the values of tensors, which are never written.
    """

    def __init__(self, model: nn.Module, also: Iterable[Tensor] = (), undo: Callable[[], object] | None = None) -> None:
        self._undo = undo  # of something else; may be repeated
        modules = list(model.modules())
        self._held = [part for module in modules for part in _contents(module)]
        self._modules = [
            (module, module.training, set(module._non_persistent_buffers_set), _ours(module)) for module in modules
        ]
        own = [tensor for module in modules for tensor in module._parameters.values() if tensor is not None]
        self._tensors = [*own, *also]
        self._on = {id(tensor) for tensor in self._tensors if tensor.requires_grad}
        self._modes = Modes()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self.restore()

    def restore(self) -> None:
        self._modes.restore()
        for held, keys, values in self._held:
            if tuple(held) != keys or any(now is not then for now, then in zip(held.values(), values, strict=True)):
                held.clear()
                held.update(zip(keys, values, strict=True))
        for module, training, unsaved, ours in self._modules:
            module.training = training
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(unsaved)
            for key in _ours(module).keys() - ours.keys():
                del vars(module)[key]
            vars(module).update(ours)
        for tensor in self._tensors:
            tensor.requires_grad = id(tensor) in self._on
        if self._undo is not None:
            self._undo()


def _autocast_depth() -> int:
    """Torch tells it only when it changes: up and down again in one step of Python, where no interrupt can come."""
    up_and_down: tuple[Any, Any] = (torch.autocast_increment_nesting, torch.autocast_decrement_nesting)
    return list(map(BuiltinFunctionType.__call__, up_and_down))[1]


def _contents(module: nn.Module) -> Iterator[tuple[dict[str, Any], tuple[str, ...], tuple[Any, ...]]]:
    attributes = vars(module)
    for key in _HELD:
        if (held := attributes.get(key)) is not None:
            yield held, tuple(held), tuple(held.values())


def _ours(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if key.startswith(OURS) or key in SAVING}
