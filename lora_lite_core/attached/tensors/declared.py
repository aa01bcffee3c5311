"""What a variant declares for a layer: its specs, the names, dtypes and seeds of its tensors, and a fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...contract.config import AdapterConfig
from ...contract.errors import BrokenPlugin, LoraLiteError, ModelStateError
from ...contract.param_spec import ParamSpec
from ...contract.target import Target
from ...layers.kinds.layer_kinds import layer_dtype
from ..targets.experts import as_layer, first_layer


def specs_for(target: Target) -> dict[str, ParamSpec]:
    """The checked parameter specs of one layer. What the variant raises is raised with the layer's name before it."""
    sizes = {"d_in": target.d_in, "d_out": target.d_out}
    layer = first_layer(target) if "layer" in target.variant.param_specs.argnames else None
    given = {**sizes, "cfg": target.cfg, "layer": layer, "name": target.name}
    try:
        specs = target.variant.param_specs(given)
    except LoraLiteError as error:  # a variant refuses a layer; it does not know its name
        raise type(error)(f"{target.name}: {error}") from error
    label = f"param_specs of variant '{target.variant.name}' for {target.name}"
    if not isinstance(specs, Mapping) or not all(isinstance(spec, ParamSpec) for spec in specs.values()):
        raise BrokenPlugin(f"{label} returned {specs!r}; return a dict of name: ParamSpec(…)")
    if not specs:
        raise BrokenPlugin(f"{label} returned no tensor; an adapter has at least one")
    for bare in specs:
        if not bare.startswith("lora_") or not bare.isidentifier() or "__" in bare:
            raise BrokenPlugin(
                f"{label} names a tensor '{bare}'; names start with lora_, are identifiers and have no __"
            )
    return {bare: spec if spec.shared else _stacked(spec, target.experts) for bare, spec in specs.items()}


def _stacked(spec: ParamSpec, count: int) -> ParamSpec:
    """The same for each of so many experts, filled one after the other."""
    if not count:
        return spec

    def fill(stack: Tensor, generator: torch.Generator) -> None:
        for tensor in stack:
            spec.fill(tensor, generator)

    return replace(spec, shape=(count, *spec.shape), init=spec.init if spec.init in ("zeros", "ones") else fill)


def attribute_name(bare: str, adapter: str, part: str = "") -> str:
    """`lora_A` on the layer for "default", `lora_A__style` for "style"; `lora_A_down_proj` for a part of it."""
    own = f"{bare}_{part}" if part else bare
    return own if adapter == "default" else f"{own}__{adapter}"


def shared_key(spec: ParamSpec) -> str:
    """The name of a shared tensor in files, and on the model where the adapter is the default one: `lora_A_64x256`."""
    return f"lora_{spec.shared}_{'x'.join(map(str, spec.shape))}"


def tensor_dtype(spec: ParamSpec, cfg: AdapterConfig, layer: nn.Module) -> torch.dtype:
    if spec.dtype is not None:
        return spec.dtype
    if cfg.dtype is not None:
        return getattr(torch, str(cfg.dtype))
    return torch.float64 if layer_dtype(layer) == torch.float64 else torch.float32


def generator_for(seed: int, target: Target, tensor: str) -> torch.Generator:
    """A CPU generator that depends on the seed and these names alone: not on order, device, process or other targets.

    The adapter's name is one of them, so that two adapters start differently; "default" is left out, as it always was.
    """
    words = [str(seed), target.name, tensor, *([] if target.adapter == "default" else [target.adapter])]
    digest = hashlib.sha256("\n".join(words).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def take_fingerprint(target: Target) -> list[float] | None:
    """What the adapter assumes about this layer, as plain floats for a file's header."""
    if target.variant.fingerprint is None:
        return None
    value = target.variant.fingerprint({"layer": as_layer(target), "cfg": target.cfg})
    if value is not None and not isinstance(value, Tensor):
        raise BrokenPlugin(
            f"fingerprint of variant '{target.variant.name}' returned {type(value).__name__}; return a tensor or None"
        )
    return None if value is None else [float(f"{v:.7g}") for v in value.detach().float().flatten().tolist()]


def weight_version(layer: nn.Module, part: str = "") -> int:
    """How often torch has seen the layer's weight written in place."""
    weight = layer._parameters.get(part or "weight")
    return -1 if weight is None else weight._version


def check_not_flat(target: Target) -> None:
    """Raise ModelStateError where tensors have not the shapes that were declared: flat shards of FSDP1, or the empty
    ones of ZeRO-3, which nothing here can put together."""
    params = target.params
    for bare, spec in specs_for(target).items() if target.stack is None else ():
        if tuple(params[bare].shape) != tuple(spec.shape):
            raise ModelStateError(
                f"{target.name}.{bare} is {tuple(params[bare].shape)} and not {tuple(spec.shape)}: FSDP1 or ZeRO-3 "
                "keeps a part of it. Gather it around the call: `with FullyShardedDataParallel.summon_full_params("
                "model):`, or `with deepspeed.zero.GatheredParameters([*model.parameters()]):`"
            )
