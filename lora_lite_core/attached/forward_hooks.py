"""What sits on an adapted layer, and the two hooks that run it.

The hooks are module-level functions that read everything off the layer they are given: no closure, no registry keyed
by layer, so that copy.deepcopy, pickle, FSDP2's parameter swaps and torch.compile all see the right tensors.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..contract.errors import BrokenPlugin, ModelStateError, UnsupportedLayer
from ..contract.target import Target
from ..contract.variant import Hook
from ..layers.convolution import channels_first, channels_last, flat_weight, is_convolution, patches
from ..layers.layer_kinds import input_name

STATE = "_lora_lite"


@dataclass(frozen=True)
class LayerState:
    """All adapters of a layer in attach order, with the handles of its hooks. Replaced as a whole, never changed."""

    x_name: str  # how the layer's forward calls its input, for layer(input=x)
    targets: tuple[Target, ...] = ()
    handles: dict[str, Any] = field(default_factory=dict)
    convolves: bool = False  # then one hook, on the output, does the work of both


def state_of(layer: nn.Module) -> LayerState | None:
    return layer.__dict__.get(STATE)


def targets_on(layer: nn.Module) -> tuple[Target, ...]:
    """The adapters of the layer, in attach order."""
    state = state_of(layer)
    return state.targets if state else ()


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
    for side, (held, with_kwargs, served) in _sides(layer).items():
        wanted = any(getattr(target.variant, hook) for target in targets for hook in served)
        if wanted and side not in handles:
            handles[side] = new[side] = RemovableHandle(held, extra_dict=with_kwargs)
            with_kwargs[handles[side].id] = True
        elif not wanted and side in handles:
            handles.pop(side).remove()
    if not targets:
        delattr(layer, STATE)
        return
    x_name = state.x_name if state else input_name(layer)
    setattr(layer, STATE, LayerState(x_name, targets, handles, is_convolution(layer)))
    for side, handle in new.items():
        _sides(layer)[side][0][handle.id] = before_forward if side == "input" else after_forward


def _sides(layer: nn.Module) -> dict[str, tuple[Any, Any, tuple[str, ...]]]:
    """Torch's hooks of a layer, those of them that get keyword arguments, and a variant's hooks that they serve."""
    on_input, on_output = ("forward_input",), ("forward",)
    if is_convolution(layer):
        on_input, on_output = (), ("forward_input", "forward")
    return {
        "input": (layer._forward_pre_hooks, layer._forward_pre_hooks_with_kwargs, on_input),
        "output": (layer._forward_hooks, layer._forward_hooks_with_kwargs, on_output),
    }


def hook_in_between(layer: nn.Module) -> str:
    """The name of another hook whose effect lies between the frozen layer and ours, so that merged weights would not do
    the same, or "". Input hooks before ours and output hooks after ours are outside of both."""
    state = state_of(layer)
    handles = state.handles if state else {}
    for kind, held, later in (("input", layer._forward_pre_hooks, True), ("output", layer._forward_hooks, False)):
        if kind not in handles:  # nothing of ours on this side: output hooks act on what the layer makes, merged or not
            continue
        keys = list(held)
        at = keys.index(handles[kind].id)
        for key in keys[at + 1 :] if later else keys[:at]:
            return str(getattr(held[key], "__qualname__", type(held[key]).__name__))
    return ""


def before_forward(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    state = state_of(layer)
    if state is None or kwargs is None:  # taken off by another thread during this call
        return None
    x = args[0] if args else kwargs[state.x_name]
    for target in state.targets:
        if target.enabled and target.variant.forward_input is not None:
            x = _run(target.variant.forward_input, "forward_input", layer, target, x, None)
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, state.x_name: x})


def after_forward(layer: nn.Module, args: tuple[Any, ...], kwargs: Any, y: Any = None) -> Any:
    state = state_of(layer)
    if state is None or not isinstance(kwargs, dict):  # taken off by another thread during this call
        return None
    x = args[0] if args else kwargs[state.x_name]
    if not isinstance(y, Tensor):
        raise UnsupportedLayer(
            f"a {type(layer).__name__} returned a {type(y).__name__}, not a tensor, and cannot carry adapters; "
            "detach, then leave it out with exclude_names"
        )
    if state.convolves:
        return _convolve(state, layer, x, y)
    for target in state.targets:
        if target.enabled and target.variant.forward is not None:
            y = _run(target.variant.forward, "forward", layer, target, x, y)
    return y


def _convolve(state: LayerState, layer: Any, image: Tensor, y: Tensor) -> Tensor:
    """The same of a convolution, which is a linear layer on the patches of its input. What an adapter changes in them
    is run through the weight on its own, so that no change leaves y bit for bit."""
    targets = [target for target in state.targets if target.enabled]
    if not targets:
        return y
    x, y = patches(layer, image), channels_last(layer, y)
    seen = x
    for target in targets:
        if target.variant.forward_input is not None:
            x = _run(target.variant.forward_input, "forward_input", layer, target, x, None)
    if x is not seen:
        y = y + nn.functional.linear(x - seen, flat_weight(layer)).to(y.dtype)
    for target in targets:
        if target.variant.forward is not None:
            y = _run(target.variant.forward, "forward", layer, target, x, y)
    return channels_first(layer, y)


def _run(hook: Hook, kind: str, layer: nn.Module, target: Target, x: Tensor, y: Tensor | None) -> Tensor:
    try:
        params = target.params_on(layer)
    except (AttributeError, KeyError):  # KeyError: of shared ones, and between two looks of torch
        if target in targets_on(layer):
            raise
        return x if y is None else y  # taken off by another thread during this call
    if not target.ready:
        raise ModelStateError(
            f"adapter '{target.adapter}' was attached on the meta device and has no values yet; "
            "load the base weights, then call adapters(model)[name].initialize() or load(model, path)"
        )
    for tensor in params.values():
        if tensor.is_meta and not x.is_meta:
            raise ModelStateError(
                f"the tensors of adapter '{target.adapter}' on {target.name} were moved to the meta device, "
                "as accelerate's cpu_offload does with a layer's weights; adapters need their layers on a device"
            )
        break
    given = {"x": x, "y": y, "params": params, "cfg": target.cfg, "layer": layer, "training": layer.training}
    if target.calls is not None:
        given["context"] = target.calls.current(f"variant '{target.variant.name}' on {target.name}")
    result = hook(given)
    if not isinstance(result, Tensor):
        raise BrokenPlugin(
            f"{kind} of variant '{target.variant.name}' returned {type(result).__name__}; return the new tensor"
        )
    return result


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
