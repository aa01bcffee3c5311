"""The tensors of one adapter on one layer: declared, named, made, filled, registered."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..contract.config import AdapterConfig
from ..contract.errors import BrokenPlugin, LoraLiteError
from ..contract.param_spec import ParamSpec
from ..contract.variant import Variant
from ..layers.kinds import layer_dtype


def specs_for(
    variant: Variant, name: str, layer: nn.Module, d_in: int, d_out: int, cfg: AdapterConfig
) -> dict[str, ParamSpec]:
    """The checked parameter specs of one layer. What the variant raises is raised with the layer's name before it."""
    try:
        specs = variant.param_specs({"d_in": d_in, "d_out": d_out, "cfg": cfg, "layer": layer})
    except LoraLiteError as error:  # a variant refuses a layer; it does not know its name
        raise type(error)(f"{name}: {error}") from error
    label = f"param_specs of variant '{variant.name}' for {name}"
    if not isinstance(specs, Mapping) or not all(isinstance(spec, ParamSpec) for spec in specs.values()):
        raise BrokenPlugin(f"{label} returned {specs!r}; return a dict of name: ParamSpec(…)")
    if not specs:
        raise BrokenPlugin(f"{label} returned no tensor; an adapter has at least one")
    for bare in specs:
        if not bare.startswith("lora_") or not bare.isidentifier() or "__" in bare:
            raise BrokenPlugin(
                f"{label} names a tensor '{bare}'; names start with lora_, are identifiers and have no __"
            )
    return dict(specs)


def attribute_name(bare: str, adapter: str) -> str:
    """`lora_A` on the layer for "default", `lora_A__style` for "style"."""
    return bare if adapter == "default" else f"{bare}__{adapter}"


def tensor_dtype(spec: ParamSpec, cfg: AdapterConfig, layer: nn.Module) -> torch.dtype:
    if spec.dtype is not None:
        return spec.dtype
    if cfg.dtype is not None:
        return getattr(torch, str(cfg.dtype))
    return torch.float64 if layer_dtype(layer) == torch.float64 else torch.float32


def generator_for(seed: int, layer: str, tensor: str) -> torch.Generator:
    """A CPU generator that depends on these three alone: not on order, device, process or the other targets."""
    digest = hashlib.sha256(f"{seed}\n{layer}\n{tensor}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def fill(tensor: Tensor, spec: ParamSpec, generator: torch.Generator, name: str) -> None:
    """On the CPU in float32 first, so that every device and dtype gets the same numbers."""
    if spec.init == "zeros":
        return
    dtype = torch.float32 if tensor.dtype.is_floating_point else tensor.dtype
    with torch.no_grad():
        in_place = tensor.device.type == "cpu" and tensor.dtype == dtype
        drawn = tensor if in_place else torch.zeros(tensor.shape, dtype=dtype, device="cpu")
        try:
            spec.fill(drawn, generator)
        except Exception as error:
            raise BrokenPlugin(f"init of {name}, called as f(tensor, generator), failed: {error}") from error
        if not in_place:
            tensor.copy_(drawn)


def register_tensor(layer: nn.Module, attribute: str, spec: ParamSpec, tensor: Tensor) -> None:
    if spec.as_buffer:
        layer.register_buffer(attribute, tensor, persistent=spec.persistent)
    else:
        layer.register_parameter(attribute, nn.Parameter(tensor, requires_grad=bool(spec.trainable)))


def take_fingerprint(variant: Variant, layer: nn.Module, cfg: AdapterConfig) -> list[float] | None:
    """What the adapter assumes about this layer, as plain floats for a file's header."""
    if variant.fingerprint is None:
        return None
    with torch.no_grad():
        value = variant.fingerprint({"layer": layer, "cfg": cfg})
    if value is not None and not isinstance(value, Tensor):
        raise BrokenPlugin(
            f"fingerprint of variant '{variant.name}' returned {type(value).__name__}; return a tensor or None"
        )
    return None if value is None else [float(f"{v:.7g}") for v in value.detach().float().flatten().tolist()]
