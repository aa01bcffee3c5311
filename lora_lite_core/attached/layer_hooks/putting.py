"""Putting adapters on a layer and taking them off: its state and its hooks, in steps that other threads may see."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ...contract.errors import BrokenPlugin
from ...contract.target import Target
from ...layers.kinds.layer_kinds import input_name
from .forward_hooks import after_forward, before_forward
from .layer_state import STATE, LayerState, state_of, targets_on


def add_target(target: Target) -> None:
    """Put an adapter on its layer, after those that are there."""
    _set_targets(target.layer, (*targets_on(target.layer), target))


def remove_target(layer: nn.Module, adapter: str) -> None:
    """Take an adapter off the layer; the last one takes hooks and state with it."""
    if state_of(layer) is not None:
        _set_targets(layer, tuple(target for target in targets_on(layer) if target.adapter != adapter))


def _set_targets(layer: nn.Module, targets: tuple[Target, ...]) -> None:
    """One pre-hook and one forward hook at most, and none that no adapter on the layer uses. Other threads may run the
    layer meanwhile: a hook appears in one step, when all that it needs is there, and is gone before that is."""
    state = state_of(layer)
    handles, new = dict(state.handles) if state else {}, {}
    kind = state.kind if state else targets[0].kind if targets else "linear"
    sides = _sides(layer, kind)
    for side, (held, extra, served, _) in sides.items():
        wanted = any(getattr(target.variant, hook) for target in targets for hook in served)
        if wanted and side not in handles:
            handles[side] = new[side] = RemovableHandle(held, extra_dict=extra)
            for flags in extra:
                flags[handles[side].id] = True
        elif not wanted and side in handles:
            handles.pop(side).remove()
    if not targets:
        delattr(layer, STATE)
        return
    x_name = state.x_name if state else input_name(layer)
    there, left = ({id(target) for target in each} for each in (state.targets if state else (), targets))
    fresh = tuple(target for target in targets if id(target) not in there)
    acting, lasting = ((*(one for one in held if id(one) in left), *fresh) for held in _held(state))
    setattr(layer, STATE, LayerState(x_name, targets, handles, kind, acting, lasting))
    for side, handle in new.items():
        sides[side][0][handle.id] = sides[side][3]


def _held(state: LayerState | None) -> tuple[tuple[Target, ...], tuple[Target, ...]]:
    return (state.acting, state.lasting) if state is not None else ((), ())


def set_acting(layer: nn.Module, names: Sequence[str], lasting: Sequence[str], rows: Any) -> None:
    """Have these adapters act on the layer, in this order and on these rows; `lasting`: those of a copy."""
    state = state_of(layer)
    if state is None:
        return
    wanted = {*names, *lasting}
    on: dict[str, list[Target]] = {}
    for target in state.targets:
        if target.adapter in wanted:
            on.setdefault(target.adapter, []).append(target)
    now, then = (tuple(one for name in each for one in on.get(name, ())) for each in (names, lasting))
    if (now, then) != (state.acting, state.lasting) or rows is not state.rows:
        setattr(layer, STATE, replace(state, acting=now, lasting=then, rows=rows))


def _sides(layer: nn.Module, kind: str) -> dict[str, tuple[Any, list[Any], tuple[str, ...], Any]]:
    """Torch's hooks of a layer, the flags that it keeps of them, a variant's hooks that each side serves, and ours."""
    both = ("forward_input", "forward")
    on_input, on_output = {"convolution": ((), both), "experts": (both, both)}.get(kind, (both[:1], both[1:]))
    flags = [layer._forward_hooks_with_kwargs]
    ours: tuple[Any, Any] = before_forward, after_forward
    if kind == "experts":
        from .expert_hooks import after_experts, before_experts

        ours = before_experts, after_experts
        flags.append(layer._forward_hooks_always_called)
    return {
        "input": (layer._forward_pre_hooks, [layer._forward_pre_hooks_with_kwargs], on_input, ours[0]),
        "output": (layer._forward_hooks, flags, on_output, ours[1]),
    }


def hook_in_between(layer: nn.Module) -> str:
    """The name of another hook whose effect lies between the frozen layer and ours, so that merged weights would not do
    the same, or "". Input hooks before ours and output hooks after ours are outside of both."""
    state = state_of(layer)
    handles = state.handles if state else {}
    if state is not None and state.kind == "experts":  # ours are inside of what the module computes
        return ""
    for kind, held, later in (("input", layer._forward_pre_hooks, True), ("output", layer._forward_hooks, False)):
        if kind not in handles:  # nothing of ours on this side: output hooks act on what the layer makes, merged or not
            continue
        keys = list(held)
        at = keys.index(handles[kind].id)
        for key in keys[at + 1 :] if later else keys[:at]:
            return str(getattr(held[key], "__qualname__", type(held[key]).__name__))
    return ""


@contextmanager
def leaving_no_hook(model: nn.Module, who: str) -> Generator[None]:
    """Forward hooks that the block adds and leaves are removed, and raise BrokenPlugin unless it fails itself."""
    hooks = {m: (set(m._forward_pre_hooks), set(m._forward_hooks)) for m in model.modules()}
    left: list[str] = []
    try:
        yield
    finally:
        for name, module in model.named_modules():
            for held, before in zip((module._forward_pre_hooks, module._forward_hooks), hooks[module], strict=True):
                for key in set(held) - before:
                    del held[key]
                    left.append(name)
    if left:
        raise BrokenPlugin(f"{who} left a forward hook on {left[0]}; remove what it registers, as with an ExitStack")
