"""The hooks of fused experts: each product with a parameter of theirs is one of linear layers with adapters.

While the module's forward runs, its parameters are `Traced`: views of the same memory that see what is done with them.
Whatever way the module multiplies (one expert after the other, gathered for every row, grouped), the product is
computed by the very call it makes, and the adapters of the experts in question get its rows. What is not understood is
an error. Nothing of it is left on the module after the call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...contract.errors import ModelStateError, UnsupportedLayer
from ...layers.kinds.experts import bias_name
from .expert_products import LISTENERS, Note, Traced, view_of
from .expert_rows import Run
from .layer_state import state_of

_SWITCHING: Any = threading.RLock()
OPEN = "_lora_lite_open"  # on the module: the threads that are in its forward


def before_experts(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
    state, listeners = state_of(layer), vars(layer).get(LISTENERS, {})
    on = state.acting if state is not None else ()
    if on and state is not None and state.rows is not None:
        raise ModelStateError(
            f"{on[0].name}: fused experts get rows of the whole batch by their routing, not by adapters; "
            "inside routed, name adapters that are on other layers, or run the batch of each adapter apart"
        )
    used: dict[str, bool] = {}
    views: dict[str, Traced] = {}
    for part in dict.fromkeys((*(target.part for target in on), *listeners)):
        targets = tuple(target for target in on if target.part == part)
        used[part] = False
        views[part] = view_of(layer._parameters[part], Note(layer, part, targets, used))
        if bias := bias_name(layer, part):
            views[bias] = view_of(layer._parameters[bias], Note(layer, part, targets, used, "bias"))
    if torch.compiler.is_compiling():
        vars(layer).update(views)
    elif views:
        _alone(_open, layer, views)


def _open(layer: nn.Module, views: dict[str, Traced]) -> None:
    vars(layer).setdefault(OPEN, set()).add(threading.get_ident())
    vars(layer).update(views)


def _alone(act: Callable[..., Any], *given: Any) -> Any:
    """While no other thread changes what stands on a module. Let go twice, so that an interrupt in the first is made
    good by the second."""
    try:
        try:
            _SWITCHING.acquire()
            return act(*given)
        finally:
            _let_go()
    finally:
        _let_go()


def _let_go() -> None:
    while _SWITCHING._is_owned():
        _SWITCHING.release()


def listen(layer: nn.Module, part: str, call: Run) -> None:
    """Have every expert's number, rows and outputs seen before they leave its product; for a module that is run apart
    (a twin). The call returns the outputs."""
    if state_of(layer) is None and LISTENERS not in vars(layer):
        layer.register_forward_pre_hook(before_experts, with_kwargs=True)
        layer.register_forward_hook(after_experts, with_kwargs=True, always_call=True)
    vars(layer).setdefault(LISTENERS, {})[part] = call


def after_experts(layer: nn.Module, args: tuple[Any, ...], kwargs: Any, y: Any = None) -> None:
    """Also when the forward fails; another thread that is still in it keeps its view of the parameters."""
    close = _close if torch.compiler.is_compiling() else _close_for_this_thread
    try:
        notes = close(layer)
    except BaseException:  # an interrupt
        close(layer)
        raise
    if y is None or not (args and isinstance(args[0], Tensor) and args[0].numel()):
        return
    if unused := [note.part for note in notes if note.kind == "weight" and not note.used[note.part]]:
        raise UnsupportedLayer(
            f"a {type(layer).__name__} ran without multiplying by its {unused[0]}, so that adapters on it did "
            "nothing; choose another experts_implementation, or leave it out with exclude_names"
        )


def _close(layer: nn.Module) -> list[Note]:
    """The module's own parameters stand where they did; the notes of the views that did. May be repeated."""
    held = vars(layer)
    return [held.pop(name).note for name in [*layer._parameters] if name in held]


def _close_for_this_thread(layer: nn.Module) -> list[Note]:
    """The same, unless another thread is in the module's forward."""
    return list(_alone(_close_unless_open, layer))


def _close_unless_open(layer: nn.Module) -> list[Note]:
    held = vars(layer)
    threads = held.get(OPEN, set())
    threads.discard(threading.get_ident())
    if threads:
        return []
    held.pop(OPEN, None)
    return _close(layer)
