"""Where an adapter can go: a layer's kind and sizes, by its name in the model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from ...contract.errors import TargetError, UnsupportedLayer
from ...contract.variant import Variant
from ...layers.kinds.convolution import is_convolution
from ...layers.kinds.embedding import is_embedding
from ...layers.kinds.experts import experts_in, keeps_transposed
from ...layers.kinds.layer_kinds import is_a, kind_of, target_sizes


class Place(NamedTuple):
    """A layer, or a parameter of fused experts, with the widths of it or of each of them."""

    layer: nn.Module
    kind: str
    d_in: int
    d_out: int
    part: str = ""
    experts: int = 0


def place_of(layer: nn.Module, part: str = "") -> Place | None:
    """What a layer is, or a parameter of it; None for what carries no adapter but as a block."""
    if part:
        found = experts_in(layer, part)
        return None if found is None else Place(layer, "experts", found.d_in, found.d_out, part, found.number)
    sizes = target_sizes(layer)
    return None if sizes is None else Place(layer, kind_of(layer), *sizes)


def place_at(model: nn.Module, name: str) -> Place | None:
    """What is there under a dotted name, of a module or of a parameter."""
    module = module_at(model, name)
    if module is not None:
        return place_of(module)
    path, _, part = name.rpartition(".")
    owner = module_at(model, path) if path else model
    return None if owner is None else place_of(owner, part)


def found_at(model: nn.Module, name: str, variant: Variant) -> Place:
    """What a file names: a layer, a parameter of experts, or a block for a variant that serves blocks. Raises
    UnsupportedLayer for anything else."""
    place, module = place_at(model, name), module_at(model, name)
    if place is not None:
        return place
    if module is None or "block" not in variant.layers:
        kind = "parameter" if module is None else type(module).__name__
        raise UnsupportedLayer(f"{name} is a {kind}, which is no layer that an adapter can go on")
    return Place(module, "block", *block_sizes(model, name))


def layer_or_norm(model: nn.Module, name: str) -> Place | None:
    """The same of a module that PEFT has adapted: a layer, a parameter of experts, or a norm, which is a block here."""
    place, module = place_at(model, name), module_at(model, name)
    if place is not None or module is None or _own_width(module) is None:
        return place
    return Place(module, "block", *block_sizes(model, name))


def module_at(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def places(model: nn.Module) -> Iterator[tuple[str, Place]]:
    """Every layer and every parameter of experts with its dotted name, in the model's order."""
    for name, module in model.named_modules():
        if name and (place := place_of(module)) is not None:
            yield name, place
        for part in module._parameters:
            if not part.startswith("lora_") and (place := place_of(module, part)) is not None:
                yield f"{name}.{part}" if name else part, place


def block_sizes(model: nn.Module, name: str) -> tuple[int, int]:
    """The width of a block, twice: that of a norm's own weight, the model's hidden size, or what the first linear layer
    in it takes."""
    module = model.get_submodule(name)
    hidden = _own_width(module) or hidden_size(model)
    if hidden is None:
        inner = (target_sizes(module) for module in module.modules() if kind_of(module) == "linear")
        hidden = next((sizes[0] for sizes in inner if sizes), None)
    if hidden is None:
        raise TargetError(
            f"the width of {name} cannot be told: no linear layer is in it, and {type(model).__name__} has no "
            "config.hidden_size"
        )
    return hidden, hidden


def _own_width(module: nn.Module) -> int | None:
    """Of a norm: of a module without others in it whose weight is a vector."""
    weight = module._parameters.get("weight")
    vector = weight is not None and weight.dim() == 1 and next(module.children(), None) is None
    return len(weight) if vector and weight is not None else None


def hidden_size(model: nn.Module) -> int | None:
    """model.config.hidden_size, where there is one."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    size = getattr(config, "hidden_size", None)
    return size if isinstance(size, int) else None


def check_served(variant: Variant, name: str, place: Place) -> None:
    """Raise UnsupportedLayer where a variant does not serve this kind of layer."""
    if place.kind not in variant.layers:
        raise UnsupportedLayer(
            f"{name} ({_named(place)}): variant '{variant.name}' serves {', '.join(variant.layers)} (its LAYERS)"
        )
    if is_convolution(place.layer) and place.layer.groups != 1 and _reads_rows(variant):
        raise UnsupportedLayer(
            f"{name} is a {type(place.layer).__name__} with groups={place.layer.groups}, whose patches do not go "
            f"through one weight, as variant '{variant.name}' needs it (methods that look at outputs alone do not); "
            f"add exclude_names=(…, '{name.rpartition('.')[2]}')"
        )
    if place.kind == "embedding" and variant.forward_input is not None:
        raise UnsupportedLayer(
            f"{name} ({_named(place)}): variant '{variant.name}' changes what a layer receives, and an embedding "
            "receives token ids; leave it out with exclude_names"
        )


def _reads_rows(variant: Variant) -> bool:
    """Whether a variant looks at more than a layer's output, row for row of the weight."""
    return variant.forward_input is not None or variant.asks("x") or variant.asks("layer")


def _named(place: Place) -> str:
    return f"{place.kind}, {type(place.layer).__name__}"


def check_layer(name: str, layer: nn.Module) -> None:
    """Raise UnsupportedLayer for a layer on which an adapter would silently do nothing or go wrong."""
    leave_out = f"add exclude_names=(…, '{name.rpartition('.')[2]}')"
    if is_embedding(layer) and layer.max_norm is not None:
        raise UnsupportedLayer(
            f"{name} is an embedding with max_norm={layer.max_norm}, which writes its weight while it runs; {leave_out}"
        )
    if is_a(layer, "NonDynamicallyQuantizableLinear"):
        raise UnsupportedLayer(
            f"{name} belongs to an nn.MultiheadAttention, which reads its weight without calling it, so that an "
            f"adapter would never run; {leave_out}"
        )
    if re.search(r"(^|\.)(mixer|mamba)\.dt_proj$", name):
        raise UnsupportedLayer(
            f"{name} belongs to a Mamba layer, which reads its weight without calling it, so that an adapter would "
            "never run; add exclude_names=(…, 'dt_proj')"
        )
    if getattr(getattr(layer, "_hf_hook", None), "offload", False):
        raise UnsupportedLayer(
            f"the weight of {name} is offloaded by accelerate and is not here when an adapter needs it; "
            "load the model without offload (a device_map without 'cpu' and 'disk')"
        )


def unknown_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Parameters that look like fused experts of modules that do not say how they keep them."""
    return {
        f"{name}.{part}": module
        for name, module in model.named_modules()
        if keeps_transposed(module) is None and kind_of(module) == ""
        for part, weight in module._parameters.items()
        if part != "weight" and weight is not None and weight.dim() == 3 and weight.is_floating_point()
    }
