"""Dry runs: which layers a model really calls, so that adapters that would never act are found; and whether a layer of
an unusual class can carry any."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..contract.errors import TargetError, listed
from ..contract.text import count
from .kinds.layer_kinds import sizes_of
from .twins import Twins
from .weight_reading import base_forward, probe, within

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode


def check_reached(model: nn.Module, layers: Mapping[str, nn.Module], batch: Any) -> None:
    """Raise TargetError when a run on this batch (as `run_batch` takes it) does not call one of the layers."""
    if isinstance(batch, Mapping):
        called = called_layers(model, layers, (), dict(batch))
    else:
        called = called_layers(model, layers, batch if isinstance(batch, (tuple, list)) else (batch,), {})
    if silent := [name for name in layers if name not in called]:
        raise TargetError(
            f"check_inputs: {count(len(silent), 'target')} of {len(layers)} never called, adapters there would do "
            f"nothing: {listed(silent)}\n  leave them out with exclude_names, or check with inputs that reach them"
        )


def called_layers(
    model: nn.Module, layers: Mapping[str, nn.Module], args: Iterable[Any], inputs: dict[str, Any]
) -> set[str]:
    """The names of those layers that a run on these inputs calls: without computing, or where the model looks at values
    for real; a twin of the model runs."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    batch = (tuple(args), inputs)
    try:
        return _run(model, layers, batch, FakeTensorMode(allow_non_fake_inputs=True))
    except Exception:
        return _run(model, layers, batch, None)


def _run(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batch: tuple[tuple[Any, ...], dict[str, Any]],
    faking: FakeTensorMode | None,
) -> set[str]:
    """The names of the layers that a twin of the model calls, for real or (faking) without computing."""
    seen: set[str] = set()
    twins = Twins()
    twin = twins.of(model)
    for name, layer in layers.items():
        twins.of(layer).register_forward_hook(lambda *_, name=name: seen.add(name))
    args, inputs = twins.of(batch)
    with within(_random_numbers_kept(model), torch.no_grad(), twins.kept_apart(), *([faking] if faking else [])):
        if faking is not None:
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


def misbehaviour(layer: nn.Module) -> str:
    """Why a frozen layer of an unusual class cannot carry adapters, as a clause, or "": a twin is tried on two rows."""
    draws = torch.randn(3, sizes_of(layer)[0], generator=torch.Generator().manual_seed(0))
    with probe(layer, bias=True) as (twin, zero):
        rows = draws.to(zero)
        rows[2] = rows[0] + rows[1]
        with torch.enable_grad():
            rows.requires_grad_()
            images: object = base_forward(twin, rows)
            if not isinstance(images, Tensor):
                return f"returns a {type(images).__name__}, not a tensor"
            if images.requires_grad:
                images.sum().backward(inputs=[rows])
            if rows.grad is None:
                return (
                    "passes no gradient to its input, so that adapters on it and before it would silently not be "
                    "trained (a weight-only quantisation, or bitsandbytes, does)"
                )
        rest = images[0] + images[1] - base_forward(twin, zero)[0] - images[2]
        return "" if rest.norm() <= 0.1 * images[2].norm() else "is not affine in its input"
