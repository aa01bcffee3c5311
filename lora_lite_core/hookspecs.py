"""The contract of a variant: six functions, each marked `@hookimpl`, each naming only the arguments it needs.

Two are required: `param_specs`, and `forward` or `forward_input`. Shapes: x is (..., d_in), y is (..., d_out).

CONTRACT_VERSION counts changes of hooks and arguments. A new argument breaks nobody, because a function names only what
it needs. One that is to go is first marked with `warn_on_impl_args` for a release: whoever names it gets a warning at
the line of their own function.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from .config import AdapterConfig
    from .install import Target
    from .spec import ParamSpec

CONTRACT_VERSION = 1

hookspec = pluggy.HookspecMarker("lora_lite")
hookimpl = pluggy.HookimplMarker("lora_lite")


@hookspec(firstresult=True)
def param_specs(d_in: int, d_out: int, cfg: AdapterConfig, layer: nn.Module) -> Mapping[str, ParamSpec]:  # type: ignore[empty-body]
    """The tensors of one layer by name; every name starts with `lora_`. Pure: no side effect, no tensor made."""


@hookspec(firstresult=True)
def init(
    layer: nn.Module, params: dict[str, Tensor], cfg: AdapterConfig, name: str, generator: torch.Generator
) -> None:
    """Fill `params` in place where a spec's own init is not enough. Runs under no_grad; `name` is the layer's dotted
    name, `generator` a CPU one. Never writes the layer's own tensors."""


@hookspec(firstresult=True)
def group_init(model: nn.Module, targets: tuple[Target, ...], cfg: AdapterConfig, calibration_data: Any) -> None:
    """Once over all targets, after every `init`, under no_grad; skipped by `load`. May reconfigure and drop targets."""


@hookspec(firstresult=True)
def forward_input(x: Tensor, params: dict[str, Tensor], cfg: AdapterConfig, layer: nn.Module) -> Tensor:  # type: ignore[empty-body]
    """The new input of the frozen layer, same shape and dtype as x."""


@hookspec(firstresult=True)
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: AdapterConfig, layer: nn.Module) -> Tensor:  # type: ignore[empty-body]
    """The new output (not the delta), same shape and dtype as y; x is what the frozen layer received."""


@hookspec(firstresult=True)
def fingerprint(layer: nn.Module, cfg: AdapterConfig) -> Tensor | None:
    """What the adapter assumes about the base: usually `sketch(layer)`. None means any base will do. A small float
    tensor whose last element is the scale that differences are compared with."""
