"""What stands on an adapted layer, read at every call, and one hook of a variant run on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
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
    acting: tuple[Target, ...] = ()  # those that act, in their order
    lasting: tuple[Target, ...] = ()  # those that do outside of all with-blocks
    rows: Any = None  # of the batch that each of them acts on; None: all

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: a copy is outside of the with-blocks that the original is in."""
        return {**vars(self), "acting": self.lasting, "rows": None}


def state_of(layer: nn.Module) -> LayerState | None:
    return layer.__dict__.get(STATE)


def targets_on(layer: nn.Module) -> tuple[Target, ...]:
    """The adapters of the layer, in attach order."""
    state = state_of(layer)
    return state.targets if state else ()


def run(
    hook: Hook, kind: str, layer: nn.Module, target: Target, x: Tensor, y: Tensor | None, rows: Tensor | None = None
) -> Tensor:
    """One hook of a variant on a layer, or on an expert (the target then says of which); on these rows of a batch."""
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
    if target.strength is not None:
        return blended(x if y is None else y, result, target.strength, target, rows)
    return result


def blended(before: Tensor, after: Tensor, strength: Tensor, target: Target, rows: Tensor | None = None) -> Tensor:
    """before + strength · (after − before): `before` bit for bit at 0, and `after` at 1. One number, or one for each
    row of the batch, of which the first dimension may hold several in sequence (beams, tokens of a flattened batch)."""
    weight = strength.to(before.device, torch.float64 if before.dtype == torch.float64 else torch.float32)
    if weight.dim() and rows is not None:
        weight = weight[rows].view(-1, *(1,) * (before.dim() - 1))
    elif weight.dim():
        times, rest = divmod(len(before), len(weight)) if len(weight) else (0, 1)
        if rest:
            raise ModelStateError(
                f"adapter '{target.adapter}' has a strength for each of {len(weight)} rows, and {target.name} got "
                f"{len(before)} in its first dimension; give one number, or as many as the batch has rows"
            )
        weight = weight.repeat_interleave(times).view(-1, *(1,) * (before.dim() - 1))
    mixed = torch.lerp(before.to(weight.dtype), after.to(weight.dtype), weight).to(after.dtype)
    return torch.where(weight == 0, before.to(after.dtype), mixed)


def is_acting(target: Target) -> bool:
    """Whether the adapter acts on its layer now."""
    of = target.stack or target
    state = state_of(of.layer)
    return state is not None and of in state.acting
