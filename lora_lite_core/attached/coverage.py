"""Which layers a model really calls: a dry run that finds targets whose adapter would never act."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ..contract.errors import TargetError, listed
from ..contract.text import count
from ..layers.kinds import layer_sizes
from ..layers.twin import Twins
from .records import records_of
from .targeting import linear_layers

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode


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
    """Run a twin of the model on these inputs without computing, and report which layers were called.

    The targets are the adapted layers, or all linear layers when there is no adapter. The twin has the model's hooks
    and runs in eval mode under FakeTensorMode; a model that looks at values (as expert routing does) is run for real
    under no_grad instead, and then layers count as silent that these inputs did not reach. Nothing of the model, the
    inputs and torch's random numbers is changed; what forward keeps elsewhere (globals, an lru_cache, a recorder that a
    hook fills) is not the model's. Raises ModelStateError for a model whose class forbids copies.
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
    if isinstance(batch, Mapping):
        called = _called(model, layers, ((), dict(batch)))
    else:
        called = _called(model, layers, (batch if isinstance(batch, (tuple, list)) else (batch,), {}))
    if silent := [name for name in layers if name not in called]:
        raise TargetError(
            f"check_inputs: {count(len(silent), 'target')} of {len(layers)} never called, adapters there would do "
            f"nothing: {listed(silent)}\n  leave them out with exclude_names, or check with inputs that reach them"
        )


def _called(model: nn.Module, layers: dict[str, nn.Module], batch: tuple[Iterable[Any], dict[str, Any]]) -> set[str]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        return _run(model, layers, batch, FakeTensorMode(allow_non_fake_inputs=True))
    except Exception:
        return _run(model, layers, batch, None)


def _run(
    model: nn.Module,
    layers: dict[str, nn.Module],
    batch: tuple[Iterable[Any], dict[str, Any]],
    faking: FakeTensorMode | None,
) -> set[str]:
    """The names of the layers that a twin of the model calls, for real or (faking) without computing."""
    seen: set[str] = set()
    twins = Twins()
    twin = twins.of(model)
    for name, layer in layers.items():
        twins.of(layer).register_forward_hook(lambda *_, name=name: seen.add(name))
    args, inputs = twins.of((tuple(batch[0]), batch[1]))
    with ExitStack() as stack:
        stack.enter_context(_random_numbers_kept(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(twins.kept_apart())
        if faking is not None:
            stack.enter_context(faking)
            args, inputs = tree_map_only(torch.Tensor, faking.from_tensor, (args, inputs))
        twin(*args, **inputs)
    return seen


@contextmanager
def _random_numbers_kept(model: nn.Module) -> Generator[None]:
    """What is drawn inside is drawn again after it: the global generators of torch (on the model's devices) and of
    Python come back as they were."""
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    state = random.getstate()
    try:
        with torch.random.fork_rng(sorted(devices)):
            yield
    finally:
        random.setstate(state)


def _size(layer: nn.Module) -> int:
    """Weights of a linear layer whatever way they are stored."""
    d_in, d_out = layer_sizes(layer) or (0, 0)
    return d_in * d_out + (d_out if getattr(layer, "bias", None) is not None else 0)
