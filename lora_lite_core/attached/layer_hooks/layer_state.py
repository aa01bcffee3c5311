"""What stands on an adapted layer, read at every call, and one hook of a variant run on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ...contract.errors import BrokenPlugin, ModelStateError
from ...contract.target import Target
from ...contract.variant import Hook

STATE = "_lora_lite"


@dataclass(frozen=True)
class LayerState:
    """All adapters of a layer in attach order, with the handles of its hooks. Replaced as a whole, never changed."""

    x_name: str  # how the layer's forward calls its input, for layer(input=x)
    targets: tuple[Target, ...] = ()
    handles: dict[str, Any] = field(default_factory=dict)
    kind: str = "linear"  # of a convolution one hook, on the output, does the work of both


def state_of(layer: nn.Module) -> LayerState | None:
    return layer.__dict__.get(STATE)


def targets_on(layer: nn.Module) -> tuple[Target, ...]:
    """The adapters of the layer, in attach order."""
    state = state_of(layer)
    return state.targets if state else ()


def run(hook: Hook, kind: str, layer: nn.Module, target: Target, x: Tensor, y: Tensor | None) -> Tensor:
    """One hook of a variant on a layer, or on an expert (the target then says of which)."""
    try:
        params = target.params_on(layer)
    except (AttributeError, KeyError):  # KeyError: of shared ones, and between two looks of torch
        if target.seen is not None or target in targets_on(layer):
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
