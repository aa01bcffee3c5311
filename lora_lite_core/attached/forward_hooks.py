"""What sits on an adapted layer, and the two hooks that run it.

The hooks are module-level functions that read everything off the layer they are given: no closure, no registry keyed
by layer, so that copy.deepcopy, pickle, FSDP2's parameter swaps and torch.compile all see the right tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..contract.config import AdapterConfig
from ..contract.errors import BrokenPlugin, ModelStateError, UnsupportedLayer
from ..contract.variant import Hook, Variant
from ..layers.kinds import input_name

STATE = "_lora_lite"


@dataclass
class Entry:
    """One adapter on one layer. `attributes` maps bare names to the layer's attributes (`lora_A` → `lora_A__style`)."""

    name: str
    variant: Variant
    cfg: AdapterConfig
    attributes: dict[str, str]
    enabled: bool = True
    ready: bool = True  # False from `attach` on the meta device until `initialize`

    def params(self, layer: nn.Module) -> dict[str, Tensor]:
        return {bare: getattr(layer, attribute) for bare, attribute in self.attributes.items()}


@dataclass
class LayerState:
    """All adapters of a layer in attach order, with the handles of its hooks."""

    x_name: str  # how the layer's forward calls its input, for layer(input=x)
    entries: list[Entry] = field(default_factory=list)
    handles: dict[str, Any] = field(default_factory=dict)


def state_of(layer: nn.Module) -> LayerState | None:
    return layer.__dict__.get(STATE)


def add_entry(layer: nn.Module, entry: Entry) -> None:
    """Put an adapter on the layer, after those that are there."""
    state = state_of(layer)
    if state is None:
        state = LayerState(input_name(layer))
        setattr(layer, STATE, state)
    state.entries.append(entry)
    _refresh(layer, state)


def remove_entry(layer: nn.Module, name: str) -> None:
    """Take an adapter off the layer; the last one takes hooks and state with it."""
    state = state_of(layer)
    if state is None:
        return
    state.entries = [entry for entry in state.entries if entry.name != name]
    _refresh(layer, state)
    if not state.entries:
        delattr(layer, STATE)


def _refresh(layer: nn.Module, state: LayerState) -> None:
    """One pre-hook and one forward hook at most, and none that no adapter on the layer uses."""
    wanted = {
        "input": any(entry.variant.forward_input for entry in state.entries),
        "output": any(entry.variant.forward for entry in state.entries),
    }
    for side in [side for side in state.handles if not wanted[side]]:
        state.handles.pop(side).remove()
    if wanted["input"] and "input" not in state.handles:
        state.handles["input"] = layer.register_forward_pre_hook(before_forward, with_kwargs=True)
    if wanted["output"] and "output" not in state.handles:
        state.handles["output"] = layer.register_forward_hook(after_forward, with_kwargs=True)


def before_forward(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    state: LayerState = getattr(layer, STATE)
    x = args[0] if args else kwargs[state.x_name]
    for entry in state.entries:
        if entry.enabled and entry.variant.forward_input is not None:
            x = _run(entry.variant.forward_input, "forward_input", layer, entry, x, None)
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, state.x_name: x})


def after_forward(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
    state: LayerState = getattr(layer, STATE)
    x = args[0] if args else kwargs[state.x_name]
    if not isinstance(y, Tensor):
        raise UnsupportedLayer(
            f"a {type(layer).__name__} returned a {type(y).__name__}, not a tensor, and cannot carry adapters; "
            "detach, then leave it out with exclude_names"
        )
    for entry in state.entries:
        if entry.enabled and entry.variant.forward is not None:
            y = _run(entry.variant.forward, "forward", layer, entry, x, y)
    return y


def _run(hook: Hook, kind: str, layer: nn.Module, entry: Entry, x: Tensor, y: Tensor | None) -> Tensor:
    if not entry.ready:
        raise ModelStateError(
            f"adapter '{entry.name}' was attached on the meta device and has no values yet; "
            "load the base weights, then call adapters(model)[name].initialize() or load(model, path)"
        )
    result = hook({"x": x, "y": y, "params": entry.params(layer), "cfg": entry.cfg, "layer": layer})
    if not isinstance(result, Tensor):
        raise BrokenPlugin(
            f"{kind} of variant '{entry.variant.name}' returned {type(result).__name__}; return the new tensor"
        )
    return result
