"""Which layers of a model an adapter goes on: patterns, blocks, roles, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..contract.config import AdapterConfig
from ..contract.errors import TargetError, UnsupportedLayer, closest, listed
from ..contract.target import Target
from ..contract.variant import Variant
from ..layers.convolution import is_convolution
from ..layers.layer_kinds import is_a, layer_sizes, storage_of, target_sizes

EXCLUDED = AdapterConfig.exclude_names  # the default
_READER = re.compile(r"(^|[._])(q|k|v|query|key|value)(_proj|_lin)?$")
_WRITER = re.compile(r"(^|[._])(o|o_proj|out_proj|c_proj|wo|out_lin)$|(output|attention)\.dense$")


def find_targets(model: nn.Module, cfg: AdapterConfig, variant: Variant, adapter: str) -> list[Target]:
    """The layers that the config selects, in the model's order, each with its own config.

    Raises TargetError when a pattern, block number or role selects nothing, UnsupportedLayer when one selects only
    layers that cannot carry an adapter.
    """
    linear = named_layers(model) if cfg.target_names else linear_layers(model)
    if target_sizes(model) is not None:
        raise TargetError(
            f"the model is itself a {type(model).__name__}; wrap it, as in nn.Sequential(layer), so that it has a name"
        )
    if not linear:
        raise TargetError(f"{type(model).__name__} has no linear layer that an adapter could go on")
    head = _head(model)
    whole: list[str] = []
    if cfg.train_modules:
        from .train_modules import trained_paths

        whole = trained_paths(model, cfg)
    allowed = {
        name: layer
        for name, layer in linear.items()
        if not _excluded(head, name, layer, cfg) and not _is_inside(name, whole)
    }
    _check_excludes(model, cfg)
    chosen = _by_pattern(model, cfg, linear, allowed)
    chosen = _by_block(model, cfg, chosen)
    chosen = _by_role(model, cfg, chosen)
    if not chosen:
        raise TargetError(f"no layer is left of {len(allowed)} linear layers; exclude_names={cfg.exclude_names}")
    _check_per_target(cfg, chosen)
    return [located(name, layer, cfg.for_target(name), variant, adapter) for name, layer in chosen.items()]


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear-like module by its dotted name."""
    return {name: layer for name, layer in model.named_modules() if name and layer_sizes(layer) is not None}


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The same, and what an adapter goes on only where it is named: convolutions."""
    return {name: layer for name, layer in model.named_modules() if name and target_sizes(layer) is not None}


def located(name: str, layer: nn.Module, cfg: AdapterConfig, variant: Variant, adapter: str) -> Target:
    """A target, without tensors yet, whose layer is checked to be one that an adapter can go on."""
    sizes = target_sizes(layer)
    if sizes is None:
        raise UnsupportedLayer(f"{name} is a {type(layer).__name__}, which is not a linear layer or a convolution")
    check_layer(name, layer)
    return Target(name, layer, *sizes, cfg, variant, adapter, storage=storage_of(layer))


def check_layer(name: str, layer: nn.Module) -> None:
    """Raise UnsupportedLayer for a linear layer on which an adapter would silently do nothing or go wrong."""
    if is_convolution(layer) and layer.groups != 1:
        raise UnsupportedLayer(
            f"{name} is a {type(layer).__name__} with groups={layer.groups}, whose patches do not go through one "
            f"weight; add exclude_names=(…, '{name.rpartition('.')[2]}')"
        )
    if is_a(layer, "NonDynamicallyQuantizableLinear"):
        raise UnsupportedLayer(
            f"{name} belongs to an nn.MultiheadAttention, which reads its weight without calling it, so that an "
            f"adapter would never run; add exclude_names=(…, '{name.rpartition('.')[2]}')"
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


def block_number(model: nn.Module, name: str) -> int | None:
    """The number of the block in the outermost ModuleList of the name, as 3 in `model.layers.3.mlp.up_proj`."""
    module, parts = model, name.split(".")
    for part in parts:
        if isinstance(module, nn.ModuleList):
            return int(part)
        module = getattr(module, part)
    return None


def role_of(name: str, d_in: int, d_out: int, hidden: int) -> str:
    """reader (takes the hidden state), writer (adds to it), inner (neither), or unknown."""
    if d_in == hidden and d_out == hidden:
        return "reader" if _READER.search(name) else "writer" if _WRITER.search(name) else "unknown"
    return "reader" if d_in == hidden else "writer" if d_out == hidden else "inner"


def _head(model: nn.Module) -> nn.Module | None:
    """The output embeddings, where the model says which they are."""
    try:
        return model.get_output_embeddings()  # type: ignore[operator, return-value]
    except (AttributeError, NotImplementedError):
        return None


def _excluded(head: nn.Module | None, name: str, layer: nn.Module, cfg: AdapterConfig) -> bool:
    if any(re.search(pattern, name) for pattern in cfg.exclude_names):
        return True
    return bool(cfg.exclude_names) and layer is head


def _is_inside(name: str, paths: Iterable[str]) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def _check_excludes(model: nn.Module, cfg: AdapterConfig) -> None:
    for pattern in [pattern for pattern in cfg.exclude_names if pattern not in EXCLUDED]:
        names = [name for name, _ in model.named_modules()]
        if not any(re.search(pattern, name) for name in names):
            raise TargetError(f"exclude_names: {pattern!r} matches no module{_near(pattern, names)}")


def _by_pattern(
    model: nn.Module, cfg: AdapterConfig, linear: Mapping[str, nn.Module], allowed: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    if not cfg.target_names:
        return dict(allowed)
    for pattern in cfg.target_names:
        if any(re.search(pattern, name) for name in allowed):
            continue
        if excluded := [name for name in linear if re.search(pattern, name)]:
            raise TargetError(
                f"target_names: {pattern!r} matches only excluded layers: {listed(excluded)}\n"
                f"  exclude_names={cfg.exclude_names} and the model's output head are left out; to adapt them, "
                "give exclude_names=()"
            )
        if other := {name: m for name, m in model.named_modules() if name and re.search(pattern, name)}:
            kinds = [f"{name} ({type(m).__name__})" for name, m in other.items()]
            raise UnsupportedLayer(
                f"target_names: {pattern!r} matches no linear layer and no convolution, only {listed(kinds)}\n"
                f"  linear layers here: {listed(_last_names(allowed), 20)}"
            )
        raise TargetError(
            f"target_names: {pattern!r} matches no layer{_near(pattern, allowed)}\n"
            f"  linear layers here: {listed(_last_names(allowed), 20)}"
        )
    return {n: layer for n, layer in allowed.items() if any(re.search(p, n) for p in cfg.target_names)}


def _by_block(model: nn.Module, cfg: AdapterConfig, chosen: dict[str, nn.Module]) -> dict[str, nn.Module]:
    if cfg.layers is None:
        return chosen
    numbers = {name: block_number(model, name) for name in chosen}
    there = sorted({number for number in numbers.values() if number is not None})
    if missing := [number for number in cfg.layers if number not in there]:
        raise TargetError(
            f"layers={list(cfg.layers)}: no target is in block {listed(missing)}; blocks here: {listed(there, 100)}"
        )
    return {name: layer for name, layer in chosen.items() if numbers[name] in cfg.layers}


def _by_role(model: nn.Module, cfg: AdapterConfig, chosen: dict[str, nn.Module]) -> dict[str, nn.Module]:
    if not cfg.target_roles:
        return chosen
    hidden = _hidden_size(model)
    if hidden is None:
        raise TargetError(
            f"target_roles={cfg.target_roles} needs model.config.hidden_size, which {type(model).__name__} has not; "
            "use target_names"
        )
    roles = {name: role_of(name, *(target_sizes(layer) or (0, 0)), hidden) for name, layer in chosen.items()}
    if unknown := [name for name, role in roles.items() if role == "unknown"]:
        raise TargetError(
            f"target_roles={cfg.target_roles}: the role of {listed(unknown)} cannot be told "
            f"({hidden} → {hidden}, and no known name); narrow target_names or exclude_names so that they are left out"
        )
    for role in cfg.target_roles:
        if role not in roles.values():
            raise TargetError(f"target_roles: no target is a {role}; roles here: {listed(sorted(set(roles.values())))}")
    return {name: layer for name, layer in chosen.items() if roles[name] in cfg.target_roles}


def _hidden_size(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    size = getattr(config, "hidden_size", None)
    return size if isinstance(size, int) else None


def _check_per_target(cfg: AdapterConfig, chosen: Mapping[str, nn.Module]) -> None:
    for pattern in cfg.patterns_per_target():
        if not any(re.search(pattern, name) for name in chosen):
            raise TargetError(f"rank_pattern or alpha_pattern: {pattern!r} matches no target{_near(pattern, chosen)}")


def _last_names(names: Iterable[str]) -> list[str]:
    """Distinct last parts, in order: what people write into target_names."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _near(pattern: str, names: Iterable[str]) -> str:
    parts = dict.fromkeys(part for name in names for part in (*name.split("."), name) if not part.isdigit())
    found = closest(pattern.strip("^$\\.").rpartition(".")[2], parts, 3)
    return f"; did you mean {' or '.join(repr(word) for word in found)}?" if found else ""
