"""Twins: copies of a module's structure that share its weights' memory, to be run where the module itself must not be.

What a forward writes (attributes, buffers, caches, the notes of a quantised layer) it writes into the twin. The module
never shows it, not for a moment and not to another thread.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..contract.errors import ModelStateError
from .copy_on_write import CopyOnWrite, storage_key
from .four_bit_packing import FLAG
from .kinds.layer_kinds import layer_sizes

Value = TypeVar("Value")

# Of nn.Module: the twin gets dicts of its own, of what a forward runs with hooks that see the copies.
_IDLE = frozenset((
    "_backward_pre_hooks", "_backward_hooks", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_non_persistent_buffers_set",
))  # fmt: skip
_HOOKS = frozenset((
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_modules", "_buffers",
))  # fmt: skip
_SAME = frozenset((
    type(None), bool, int, float, complex, str, bytes, range, slice, type, torch.dtype, torch.device, torch.Size,
    types.BuiltinFunctionType, types.ModuleType,
))  # fmt: skip


def twin_of(module: Value) -> Value:
    """A twin of a module, in eval mode: `Twins().of(module)`, for those who need one copy only. Its parameters may be
    replaced, and are not to be written in place."""
    return Twins().of(module)


class Twins:
    """Copies that belong together, each made when it is first asked for.

    Shared with the originals: the memory of parameters, of tensors in attributes, and of the buffers of a linear layer
    without a parameter `weight` (its packed weight), all of which `kept_apart` protects from being written; objects of
    compiled classes or with slots (locks, tokenizers, process groups). The copy's own: modules, parameter objects,
    other buffers, containers, objects of Python classes in attributes, and functions put on a module, with closures in
    which modules are copies.
    """

    def __init__(self) -> None:
        self._made: dict[int, Any] = {}  # by the original's id, like the memo of copy.deepcopy
        self._alive: list[Any] = []  # originals, so that no id is used again
        self._shared: set[int] = set()  # storages

    def of(self, value: Value) -> Value:
        """The copy of a module (in eval mode), or of any value that holds modules and tensors, such as its inputs.

        Raises ModelStateError for a module whose class forbids copies (FSDP2).
        """
        made = self._copy(value)
        if isinstance(value, nn.Module):
            made.eval()
        return made

    def share(self, original: Any, made: Any) -> None:
        """Have copies that are made later hold `made` in its place."""
        self._alive.append(original)
        self._made[id(original)] = made

    def kept_apart(self) -> AbstractContextManager[object]:
        """Inside, an operation that writes memory shared with the originals is given memory of its own first."""
        return CopyOnWrite(self._shared)

    def _copy(self, value: Any) -> Any:
        kind = type(value)
        if kind in _SAME:
            return value
        if id(value) in self._made:
            return self._made[id(value)]
        self._alive.append(value)
        made = self._made[id(value)] = _copier(kind)(self, value)
        return made

    def _module(self, module: nn.Module) -> nn.Module:
        kind = type(module)
        if hasattr(kind, "__deepcopy__"):
            return self._by_its_class(module)
        made = self._made[id(module)] = object.__new__(kind)
        saves = getattr(kind, "__getstate__", None) is not getattr(object, "__getstate__", None)
        state = dict(module.__getstate__() if saves else vars(module))
        self._own_buffers(module)
        for name, value in state.items():
            if type(value) not in _SAME:
                idle = name in _IDLE or (name in _HOOKS and not value)
                state[name] = type(value)(value) if idle else self._copy(value)
        if FLAG in state:
            state[FLAG] = False  # or bitsandbytes would rearrange the twin's weight
        if kind.__setstate__ is nn.Module.__setstate__:
            vars(made).update(state)
        else:
            made.__setstate__(state)
        return made

    def _own_buffers(self, module: nn.Module) -> None:
        packed = layer_sizes(module) is not None and module._parameters.get("weight") is None
        for tensor in () if packed else list(module._buffers.values()):
            if tensor is not None and id(tensor) not in self._made:
                self._alive.append(tensor)
                self._made[id(tensor)] = tensor.detach().clone()

    def _by_its_class(self, module: nn.Module) -> nn.Module:
        """By the class's own __deepcopy__ (parametrised and traced modules), the tensors as everywhere else."""
        for inner in module.modules():
            self._own_buffers(inner)
            for tensor in (*inner._parameters.values(), *inner._buffers.values()):
                self._copy(tensor)
        try:
            return copy.deepcopy(module, self._made)
        except Exception as error:
            raise ModelStateError(
                f"{type(module).__name__} forbids the copy of its structure that a dry run needs ({error}); "
                "run it before the model is sharded"
            ) from error

    def _tensor(self, tensor: Tensor) -> Tensor:
        if is_lazy(tensor):
            return copy.deepcopy(tensor)
        made = tensor.detach()
        if type(made) is type(tensor) and type(tensor) is not Tensor:  # it holds other tensors (torchao, DTensor)
            made.requires_grad_(tensor.requires_grad)
        elif type(tensor) is Tensor:
            made = tensor.data
        else:  # a parameter, or one of bitsandbytes' kinds of them
            made = Tensor._make_subclass(type(tensor), tensor.data, tensor.requires_grad)
        if (key := storage_key(made)) is not None:
            self._shared.add(key)
        self._made[id(tensor)] = made
        for name, value in list(vars(tensor).items()):
            vars(made).setdefault(name, self._copy(value))
        return made

    def _container(self, value: Any) -> Any:
        kind = type(value)
        try:
            made = kind(value) if kind in (dict, OrderedDict, list) else copy.copy(value)
        except Exception:  # a class of its own kind
            return value
        self._made[id(value)] = made
        if isinstance(made, dict):
            for key, held in list(made.items()):
                dict.__setitem__(made, key, self._copy(held))
        elif isinstance(made, list):
            list.__setitem__(made, slice(None), [self._copy(held) for held in list(made)])
        return made

    def _tuple(self, value: tuple[Any, ...]) -> tuple[Any, ...]:
        held = [self._copy(one) for one in value]
        if all(one is old for one, old in zip(held, value, strict=True)):
            return value
        return tuple.__new__(type(value), held)

    def _method(self, value: types.MethodType) -> types.MethodType:
        made = self._reached(value.__self__)  # a module's may close over modules; of other owners see _reached
        return types.MethodType(self._reached(value.__func__) if isinstance(made, nn.Module) else value.__func__, made)

    def _partial(self, value: functools.partial[Any]) -> functools.partial[Any]:
        named = {key: self._reached(one) for key, one in value.keywords.items()}
        made = functools.partial(self._reached(value.func), *map(self._reached, value.args), **named)
        vars(made).update(vars(value))
        return made

    def _function(self, value: types.FunctionType) -> types.FunctionType:
        """With a closure and defaults of its own, in which modules are the copies."""
        cells, defaults, named = value.__closure__ or (), value.__defaults__ or (), value.__kwdefaults__ or {}
        own_defaults = tuple(map(self._reached, defaults))
        own_named = {name: self._reached(one) for name, one in named.items()}
        pairs = (*zip(own_defaults, defaults, strict=True), *((own_named[name], named[name]) for name in named))
        if not cells and all(one is old for one, old in pairs):
            return value
        self._alive.extend(cells)
        own = tuple(self._made.setdefault(id(cell), types.CellType()) for cell in cells)
        made = types.FunctionType(value.__code__, value.__globals__, value.__name__, own_defaults or None, own)
        self._made[id(value)] = made
        made.__kwdefaults__ = own_named or None  # type: ignore[assignment]
        vars(made).update(vars(value))
        for cell, old in zip(own, cells, strict=True):
            try:
                cell.cell_contents = self._reached(old.cell_contents)
            except ValueError:  # nothing in it yet
                continue
        return made

    def _reference(self, value: weakref.ref[Any]) -> weakref.ref[Any]:
        return weakref.ref(self._copy(value())) if isinstance(value(), nn.Module) else value

    def _reached(self, value: Any) -> Any:
        """What a function holds: of a user's own objects (a trainer, a recorder) only those that were copied anyway."""
        followed = isinstance(value, _FOLLOWED)
        return self._copy(value) if followed else self._made.get(id(value), value)

    def _object(self, value: Any) -> Any:
        """Attribute by attribute, where that is what copying means for its class; else itself."""
        kind = type(value)
        plain = kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__
        slots = any(getattr(base, "__slots__", ()) for base in kind.__mro__)
        space = kind is types.SimpleNamespace
        if not (plain or space) or slots or hasattr(kind, "__deepcopy__") or not hasattr(value, "__dict__"):
            return self._foreign(value)
        try:
            made = self._made[id(value)] = types.SimpleNamespace() if space else object.__new__(kind)
        except TypeError:  # made by compiled code
            return value
        for name, held in list(vars(value).items()):
            vars(made)[name] = self._copy(held)
        return made

    def _foreign(self, value: Any) -> Any:
        try:
            return copy.deepcopy(value, self._made) if hasattr(type(value), "__deepcopy__") else value
        except Exception:
            return value


_FOLLOWED = (
    nn.Module, Tensor, dict, list, tuple, types.MethodType, types.FunctionType, functools.partial, weakref.ref,
)  # fmt: skip


_Way = Callable[[Twins, Any], Any]


@functools.lru_cache(maxsize=1024)
def _copier(kind: type) -> _Way:
    ways = {
        Tensor: Twins._tensor, nn.Module: Twins._module, dict: Twins._container, list: Twins._container,
        tuple: Twins._tuple, set: Twins._container, deque: Twins._container, types.MethodType: Twins._method,
        types.FunctionType: Twins._function, functools.partial: Twins._partial, weakref.ref: Twins._reference,
    }  # fmt: skip
    return next((cast("_Way", way) for base, way in ways.items() if issubclass(kind, base)), Twins._object)
