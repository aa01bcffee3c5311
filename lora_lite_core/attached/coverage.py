"""Which layers a model really calls: a dry run that finds targets whose adapter would never act."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..contract.errors import TargetError, listed
from ..contract.text import count
from ..layers.kinds import layer_sizes
from .records import records_of
from .targeting import linear_layers


@dataclass(frozen=True)
class Coverage:
    """What `coverage` saw: names of targets, and numbers of weights.

    fired     targets that were called in the run
    silent    targets that were not: their adapter does nothing in it
    reached   weights of the linear layers that were called, adapted or not: what adapters could act on
    total     all weights of the base
    beyond    parameters out of reach, by name, the largest first
    """

    fired: tuple[str, ...]
    silent: tuple[str, ...]
    reached: int
    total: int
    beyond: dict[str, int]

    @property
    def share(self) -> float:
        """reached / total."""
        return self.reached / max(self.total, 1)

    def __repr__(self) -> str:
        never = f"; never called: {listed(self.silent)}" if self.silent else ""
        largest = listed([f"{name} {size:,}" for name, size in self.beyond.items()], 3)
        return (
            f"<Coverage: {len(self.fired)} of {count(len(self.fired) + len(self.silent), 'target')} called{never}; "
            f"adapters can reach {self.share:.1%} of {self.total:,} weights; out of reach: {largest}>"
        )


def coverage(model: nn.Module, *args: Any, **inputs: Any) -> Coverage:
    """Run `model(*args, **inputs)` without computing, and report which layers were called.

    The targets are the adapted layers, or all linear layers when there is no adapter. The run is under FakeTensorMode,
    in eval mode; a model that looks at values (as expert routing does) is run for real under no_grad instead, and then
    layers count as silent that these inputs did not reach. Nothing of the model is changed.
    """
    adapters = records_of(model).adapters.values()
    targets = dict.fromkeys(name for record in adapters for name in record.layers)
    linear = linear_layers(model)
    called = _called(model, linear, (args, inputs))
    sizes = {name: _size(layer) for name, layer in linear.items()}
    held = {id(p) for name in linear for p in linear[name].parameters()}
    beyond = {name: sizes[name] for name in linear if name not in called}
    for name, p in model.named_parameters():
        if not name.rpartition(".")[2].startswith("lora_") and id(p) not in held:
            beyond[name] = p.numel()
    reached = sum(sizes[name] for name in linear if name in called)
    return Coverage(
        tuple(name for name in targets or linear if name in called),
        tuple(name for name in targets or linear if name not in called),
        reached,
        reached + sum(beyond.values()),
        dict(sorted(beyond.items(), key=lambda item: -item[1])),
    )


def check_reached(model: nn.Module, layers: dict[str, nn.Module], batch: Any) -> None:
    """Raise TargetError when a run on this batch (as `run_batch` takes it) does not call one of the layers."""
    if isinstance(batch, dict):
        called = _called(model, layers, ((), batch))
    else:
        called = _called(model, layers, (batch if isinstance(batch, (tuple, list)) else (batch,), {}))
    if silent := [name for name in layers if name not in called]:
        raise TargetError(
            f"check_inputs: {count(len(silent), 'target')} of {len(layers)} never called, adapters there would do "
            f"nothing: {listed(silent)}\n  leave them out with exclude_names, or check with inputs that reach them"
        )


def _called(model: nn.Module, layers: dict[str, nn.Module], batch: tuple[Iterable[Any], dict[str, Any]]) -> set[str]:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._pytree import tree_map_only

    seen: set[str] = set()
    args, inputs = batch
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(lambda *_, name=name: seen.add(name)).remove)
        stack.callback(_restorer(model))  # its mode, and caches that would keep tensors without values
        model.eval()
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
                given, named = tree_map_only(torch.Tensor, mode.from_tensor, (tuple(args), inputs))
                model(*given, **named)
        except Exception:
            seen.clear()
            with torch.no_grad():
                model(*args, **inputs)
    return seen


def _restorer(model: nn.Module) -> Callable[[], None]:
    """Puts every module's attributes, buffers and parameters back as they are now."""
    kept = [(module, dict(vars(module)), dict(module._buffers), dict(module._parameters)) for module in model.modules()]

    def restore() -> None:
        for module, attributes, buffers, parameters in kept:
            vars(module).clear()
            vars(module).update(attributes)
            for held, before in ((module._buffers, buffers), (module._parameters, parameters)):
                held.clear()
                held.update(before)  # type: ignore[arg-type]

    return restore


def _size(layer: nn.Module) -> int:
    """Weights of a linear layer whatever way they are stored."""
    d_in, d_out = layer_sizes(layer) or (0, 0)
    return d_in * d_out + (d_out if getattr(layer, "bias", None) is not None else 0)
