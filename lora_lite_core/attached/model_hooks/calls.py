"""What a model was called with, for variants that ask for `context`."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...contract.errors import ModelStateError
from ..records import check_one_owner, records_of

ARGUMENTS = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Calls:
    """The calls of one model that are under way: a list by thread, innermost last, and what `context` has added.

    In backward, where activation checkpointing runs layers again, the call is the one whose output backward came
    through: a hook on the outputs' graph says so, and calls are gone through one after the other.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names  # of the positional arguments of the model's forward
        self.added: dict[str, Any] = {}
        self._under_way: dict[int, list[dict[str, Any]]] = {}
        self._backward: dict[int, dict[str, Any]] = {}

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        call = {**dict(zip(self.names, args, strict=False)), **kwargs, **self.added}
        self._under_way.setdefault(_thread(), []).append(call)

    def end(self, output: Any) -> None:
        calls = self._under_way.get(_thread())
        if not calls:
            return  # the adapter was put on during the call
        call = calls.pop()
        if not calls:
            del self._under_way[_thread()]
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            for tensor in _tensors(output):
                if tensor.grad_fn is not None:
                    tensor.grad_fn.register_prehook(lambda _: self._enter_backward(call))

    def _enter_backward(self, call: dict[str, Any]) -> None:
        thread = _thread()
        if thread not in self._backward:
            torch.autograd.Variable._execution_engine.queue_callback(self._leave_backward)
        self._backward[thread] = call

    def _leave_backward(self) -> None:
        self._backward.pop(_thread(), None)

    def current(self, who: str) -> Mapping[str, Any]:
        """Of the call that a layer runs in; ModelStateError outside of any."""
        if calls := self._under_way.get(_thread()):
            return calls[-1]
        if not torch.compiler.is_compiling() and _thread() in self._backward:
            return self._backward[_thread()]
        raise ModelStateError(
            f"{who} asks what the model was called with, and a layer of it was called on its own; call the model"
        )

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no call under way."""
        return {**vars(self), "added": {}, "_under_way": {}, "_backward": {}}


def calls_of(model: nn.Module) -> Calls:
    """New ones for a model, with the names of its forward's arguments."""
    parameters = inspect.signature(model.forward).parameters.values()
    return Calls(tuple(parameter.name for parameter in parameters if parameter.kind in ARGUMENTS))


def begin_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    calls = records_of(model).calls
    if calls is not None:
        calls.begin(args, kwargs)


def end_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
    calls = records_of(model).calls
    if calls is not None:
        calls.end(output)


@contextmanager
def context(model: nn.Module, **values: Any) -> Generator[None]:
    """Inside, adapters that ask for it get these values beside what the model is called with: `task_ids=…`, say.

    Values of the same name win over arguments of the model. Blocks may nest. Raises ModelStateError when no adapter on
    the model asks for context.
    """
    check_one_owner(model)
    calls = records_of(model).calls
    if calls is None:
        raise ModelStateError("no adapter on the model asks for context; attach one that does before")
    before = calls.added
    calls.added = {**before, **values}
    try:
        yield
    finally:
        calls.added = before


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
