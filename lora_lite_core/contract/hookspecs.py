"""The contract of a variant: up to ten functions, each marked `@hookimpl`, each naming only the arguments it needs.

Two are required: `param_specs`, and `forward` or `forward_input`. Two more are for methods that PEFT has, too.
Shapes: x is (..., d_in), y is (..., d_out).

CONTRACT_VERSION counts changes of hooks and arguments. A new argument breaks nobody, because a function names only what
it needs. One that is to go is first marked with `warn_on_impl_args` for a release: whoever names it gets a warning at
the line of their own function.

Arguments, the same in every hook that has them:

d_in, d_out       widths of the layer, whatever way its weight is stored
cfg               this layer's config: the variant's own class, with `rank_pattern` and the like already applied
layer             the frozen layer; read it through `dense_weight(layer)` and `base_forward(layer, x)` only
params            {name: tensor} of this layer and adapter, named as in `param_specs`; uncast, read anew at every call
name              the layer's dotted name, as in "model.layers.0.self_attn.q_proj"
generator         a CPU torch.Generator, seeded from the seed of `attach`, the layer's name and "init"
model             the whole model, the adapter's tensors on it but not yet running
context           {name: value}: what the whole model was called with, and what `with ll.context(model, …)` adds
step              how many optimizer steps the adapter has been through, 0 at the first; saved, and goes on after `load`
targets           one `Target` a layer: name, layer, d_in, d_out, cfg, params, reconfigure(r=…), drop()
calibration_data  what was given to `attach`, or None; `calibration_batches(calibration_data, "name")` checks it
x                 (..., d_in), what the layer receives, any leading shape and floating dtype; token ids of an embedding
y                 (..., d_out), the output so far: of the frozen layer and of adapters attached before
training          True while the layer is in training mode; False in evaluation, and where the core merges or exports
config            the fields of PEFT's adapter_config.json, r and lora_alpha being this layer's own
tensors           {name: tensor} of this layer in PEFT's file ("lora_A.weight"), or of all layers ("base_model.vera_A")
sizes             {name: (d_in, d_out)} of all layers of the adapter, in the model's order

Constants that a module may hold:

Config            required: the config class, as in `Config = MyConfig`
AFFINE            False when the adapted layer is not affine in x, so that it cannot be merged or exported; default True
IDENTITY_ATOL     largest deviation of a fresh adapter from the identity in float32; default 0.0, bit for bit
BENCH             what `lora-lite bench` trains it well with: a learning rate for AdamW, steps, or both: {"lr": 5e-3}
IDENTITY_REASON   one sentence that says why it is not 0; required beside IDENTITY_ATOL
LAYERS            what it serves of "linear", "convolution", "embedding", "experts", "block"; default all but the last
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from .config import AdapterConfig
    from .param_spec import ParamSpec
    from .target import Target

CONTRACT_VERSION = 3

hookspec = pluggy.HookspecMarker("lora_lite")
hookimpl = pluggy.HookimplMarker("lora_lite")


@hookspec(firstresult=True)
def param_specs(d_in: int, d_out: int, cfg: AdapterConfig, layer: nn.Module, name: str) -> Mapping[str, ParamSpec]:  # type: ignore[empty-body]
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
def forward_input(
    x: Tensor,
    params: dict[str, Tensor],
    cfg: AdapterConfig,
    layer: nn.Module,
    training: bool,
    context: Mapping[str, Any],
) -> Tensor:  # type: ignore[empty-body]
    """The new input of the frozen layer, same shape and dtype as x."""


@hookspec(firstresult=True)
def forward(
    x: Tensor,
    y: Tensor,
    params: dict[str, Tensor],
    cfg: AdapterConfig,
    layer: nn.Module,
    training: bool,
    context: Mapping[str, Any],
) -> Tensor:  # type: ignore[empty-body]
    """The new output (not the delta), same shape and dtype as y; x is what the frozen layer received. What is
    random in training is drawn from torch's global generator."""


@hookspec(firstresult=True)
def before_step(targets: tuple[Target, ...], cfg: AdapterConfig, step: int) -> None:
    """Once before each step of an optimizer that `ll.follow` was given, under no_grad, over all layers. The gradients
    are there, in `.grad`, and may be rewritten; tensors are changed in place and keep their shapes (a rank is masked,
    not cut). State of the schedule is in tensors of `param_specs` and in `step`, so that it is saved."""


@hookspec(firstresult=True)
def penalty(params: dict[str, Tensor], cfg: AdapterConfig) -> Tensor:  # type: ignore[empty-body]
    """A layer's term of the loss, a scalar with a gradient; `ll.penalty(model)` adds up those of all layers. Its weight
    is a field of the config."""


@hookspec(firstresult=True)
def fingerprint(layer: nn.Module, cfg: AdapterConfig) -> Tensor | None:
    """What the adapter assumes about the base: usually `sketch(layer)`. None means any base will do. A small float
    tensor whose last element is the scale that differences are compared with."""


@hookspec(firstresult=True)
def to_peft(
    params: dict[str, Tensor], cfg: AdapterConfig, layer: nn.Module, name: str, sizes: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, Any], dict[str, Tensor]]:  # type: ignore[empty-body]
    """Fields of PEFT's adapter_config.json and the layer's tensors by PEFT's names. A field "$target_modules" becomes
    the list of all layers. Raises MergeError for what PEFT cannot hold."""


@hookspec(firstresult=True)
def from_peft(
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    layer: nn.Module,
    name: str,
    sizes: Mapping[str, tuple[int, int]],
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The way back: fields of this variant's config and the values of `params`; None for another method's files. Raises
    ConfigError for fields that this variant cannot represent. `init_lora_weights` is a name where PEFT takes
    the start out of this layer's weight: then a variant has to read it."""
