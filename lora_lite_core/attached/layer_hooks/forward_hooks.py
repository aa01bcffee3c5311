"""The two hooks that run the adapters of a layer.

They are module-level functions that read everything off the layer they are given: no closure, no registry keyed by
layer, so that copy.deepcopy, pickle, FSDP2's parameter swaps and torch.compile all see the right tensors.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...contract.errors import UnsupportedLayer
from ...layers.kinds.convolution import Patches, channels_first, channels_last, flat_weight, patches
from .layer_state import LayerState, run, state_of


def before_forward(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    state = state_of(layer)
    if state is None or kwargs is None:  # taken off by another thread during this call
        return None
    x = _inputs(state, layer, args[0] if args else kwargs[state.x_name])
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, state.x_name: x})


def after_forward(layer: nn.Module, args: tuple[Any, ...], kwargs: Any, y: Any = None) -> Any:
    state = state_of(layer)
    if state is None or not isinstance(kwargs, dict):  # taken off by another thread during this call
        return None
    x = args[0] if args else kwargs[state.x_name]
    if state.kind == "block":
        return _after_block(state, layer, x, y)
    if not isinstance(y, Tensor):
        raise UnsupportedLayer(
            f"a {type(layer).__name__} returned a {type(y).__name__}, not a tensor, and cannot carry adapters; "
            "detach, then leave it out with exclude_names"
        )
    if state.kind == "convolution":
        return _convolve(state, layer, x, y)
    return _outputs(state, layer, x, y)


def _inputs(state: LayerState, layer: nn.Module, x: Tensor) -> Tensor:
    """What the adapters that act make of the layer's input."""
    if state.rows is not None:
        return _routed(state, "forward_input", layer, x, None)
    for target in state.acting:
        if target.variant.forward_input is not None:
            x = run(target.variant.forward_input, "forward_input", layer, target, x, None)
    return x


def _outputs(state: LayerState, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """And of its output."""
    if state.rows is not None:
        return _routed(state, "forward", layer, x, y)
    for target in state.acting:
        if target.variant.forward is not None:
            y = run(target.variant.forward, "forward", layer, target, x, y)
    return y


def _routed(state: LayerState, kind: str, layer: nn.Module, x: Tensor, y: Tensor | None) -> Tensor:
    from .batch_rows import on_their_rows

    return on_their_rows(state, kind, layer, x, y)


def _convolve(state: LayerState, layer: Any, image: Tensor, y: Tensor) -> Tensor:
    """The same of a convolution, which is a linear layer on the patches of its input. What an adapter changes in them
    is run through the weight on its own, so that no change leaves y bit for bit."""
    if not state.acting:
        return y
    contiguous = y.is_contiguous()
    read = state.rows is not None or any(target.variant.forward_input is not None for target in state.acting)
    x, y = patches(layer, image) if read else Patches.of(layer, image), channels_last(layer, y)
    seen, x = x, _inputs(state, layer, x)
    if x is not seen:
        y = y + nn.functional.linear(x - seen, flat_weight(layer)).to(y.dtype)
    y = channels_first(layer, _outputs(state, layer, x, y))
    return y.contiguous() if contiguous else y  # whoever views the frozen layer's output views this one


def _after_block(state: LayerState, layer: nn.Module, x: Tensor, output: Any) -> Any:
    """The same of a block, which may return a tuple that begins with its hidden states."""
    several = isinstance(output, (tuple, list))
    y = _outputs(state, layer, x, output[0] if several else output)
    return type(output)((y, *output[1:])) if several else y
