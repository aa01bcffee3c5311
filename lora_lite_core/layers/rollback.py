"""Putting a model back as it was, when a call that changes it fails or is interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

OURS = "_lora_lite"  # what the library's own attributes of a module begin with
_HELD = (
    "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)  # fmt: skip


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
        self._flags = [(tensor, tensor.requires_grad) for tensor in (*model.parameters(), *also)]
        self._grad = torch.is_grad_enabled()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self.restore()

    def restore(self) -> None:
        torch.set_grad_enabled(self._grad)
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
        for tensor, flag in self._flags:
            tensor.requires_grad = flag
        if self._undo is not None:
            self._undo()


def _contents(module: nn.Module) -> Iterator[tuple[dict[str, Any], tuple[str, ...], tuple[Any, ...]]]:
    attributes = vars(module)
    for key in _HELD:
        if (held := attributes.get(key)) is not None:
            yield held, tuple(held), tuple(held.values())


def _ours(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if key.startswith(OURS)}
