"""Which layers of a model an adapter goes on: patterns, blocks, roles, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ...contract.config import AdapterConfig
from ...contract.errors import TargetError, UnsupportedLayer, closest, listed
from ...contract.target import Target
from ...contract.variant import Variant
from ...layers.kinds.layer_kinds import layer_sizes, storage_of, target_sizes
from .places import (
    Place,
    block_sizes,
    check_layer,
    check_served,
    hidden_size,
    place_of,
    places,
    unknown_experts,
)

Places = Mapping[str, Place]

EXCLUDED = AdapterConfig.exclude_names  # the default
_READER = re.compile(r"(^|[._])(q|k|v|query|key|value)(_proj|_lin)?$")
_WRITER = re.compile(r"(^|[._])(o|o_proj|out_proj|c_proj|wo|out_lin)$|(output|attention)\.dense$")


def find_targets(model: nn.Module, cfg: AdapterConfig, variant: Variant, adapter: str) -> list[Target]:
    """The layers that the config selects, in the model's order, each with its own config.

    Raises TargetError when a pattern, block number or role selects nothing, UnsupportedLayer when one selects only
    layers that cannot carry an adapter.
    """
    if target_sizes(model) is not None:
        raise TargetError(
            f"the model is itself a {type(model).__name__}; wrap it, as in nn.Sequential(layer), so that it has a name"
        )
    served = _served(model, cfg, variant)
    if not served:
        raise TargetError(f"{type(model).__name__} has no {_kinds(variant, cfg)} that an adapter could go on")
    head = _head(model)
    whole: list[str] = []
    if cfg.train_modules:
        from .train_modules import trained_paths

        whole = trained_paths(model, cfg)
    allowed = {
        name: place
        for name, place in served.items()
        if not _excluded(head, name, place.layer, cfg) and not _is_inside(name, whole)
    }
    _check_excludes(model, cfg)
    chosen = _by_pattern(model, cfg, variant, served, allowed)
    chosen = _by_block(model, cfg, chosen)
    chosen = _by_role(model, cfg, chosen)
    if not chosen:
        raise TargetError(
            f"no layer is left of {len(allowed)} {_kinds(variant, cfg)}s; exclude_names={cfg.exclude_names}"
        )
    _check_per_target(cfg, chosen)
    return [located(name, place, cfg.for_target(name), variant, adapter) for name, place in chosen.items()]


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear-like module by its dotted name."""
    return {name: layer for name, layer in model.named_modules() if name and layer_sizes(layer) is not None}


def located(name: str, place: Place, cfg: AdapterConfig, variant: Variant, adapter: str) -> Target:
    """A target, without tensors yet, whose layer is checked to be one that the variant's adapters can go on."""
    check_served(variant, name, place)
    check_layer(name, place.layer)
    storage = storage_of(place.layer) if place.kind not in ("experts", "block") else "dense"
    where: dict[str, Any] = {"kind": place.kind, "part": place.part, "experts": place.experts, "storage": storage}
    return Target(name, place.layer, place.d_in, place.d_out, cfg, variant, adapter, **where)


def _served(model: nn.Module, cfg: AdapterConfig, variant: Variant) -> Places:
    """What the config may choose from: linear layers, or where it names its targets all that the variant serves."""
    if not cfg.target_names and "linear" in variant.layers:
        return {name: place for name, place in places(model) if place.kind == "linear"}
    found = {name: place for name, place in places(model) if place.kind in variant.layers}
    return {**found, **_blocks(model, cfg, found)} if "block" in variant.layers else found


def _blocks(model: nn.Module, cfg: AdapterConfig, others: Places) -> Places:
    """Modules that the patterns name and that are no layers, or without patterns the members of lists of modules; the
    outermost ones."""
    found: dict[str, Place] = {}
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    for name, module in model.named_modules():
        wanted = any(re.search(p, name) for p in cfg.target_names) or (
            not cfg.target_names and name.rpartition(".")[0] in lists
        )
        special = name in others or name in lists or place_of(module) is not None
        if name and wanted and not special and not _is_inside(name, found):
            found[name] = Place(module, "block", *block_sizes(model, name))
    return found


def _kinds(variant: Variant, cfg: AdapterConfig) -> str:
    """What there may be chosen from, in words."""
    if not cfg.target_names and "linear" in variant.layers:
        return "linear layer"
    return " or ".join("linear layer" if kind == "linear" else kind for kind in variant.layers)


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
    model: nn.Module, cfg: AdapterConfig, variant: Variant, served: Places, allowed: Places
) -> dict[str, Place]:
    if not cfg.target_names:
        return dict(allowed)
    for pattern in cfg.target_names:
        if any(re.search(pattern, name) for name in allowed):
            continue
        if excluded := [name for name in served if re.search(pattern, name)]:
            raise TargetError(
                f"target_names: {pattern!r} matches only excluded layers: {listed(excluded)}\n"
                f"  exclude_names={cfg.exclude_names} and the model's output head are left out; to adapt them, "
                "give exclude_names=()"
            )
        raise _no_match(model, pattern, variant, allowed)
    return {n: place for n, place in allowed.items() if any(re.search(p, n) for p in cfg.target_names)}


def _no_match(model: nn.Module, pattern: str, variant: Variant, allowed: Places) -> TargetError | UnsupportedLayer:
    """What to say of a pattern that chooses nothing."""
    here = [name for name, place in allowed.items() if place.kind == "linear"] or [*allowed]
    there = f"\n  {'linear layers' if 'linear' in variant.layers else 'layers'} here: {listed(_last_names(here), 20)}"
    for name, place in places(model):
        if re.search(pattern, name):
            check_served(variant, name, place)
    if unknown := [(name, module) for name, module in unknown_experts(model).items() if re.search(pattern, name)]:
        name, module = unknown[0]
        return UnsupportedLayer(
            f"target_names: {pattern!r} matches {name}, and {type(module).__name__} does not say whether its experts "
            "are (E, d_out, d_in): set `is_transposed = False` on the module, or True for (E, d_in, d_out)"
        )
    if other := {name: m for name, m in model.named_modules() if name and re.search(pattern, name)}:
        kinds = [f"{name} ({type(m).__name__})" for name, m in other.items()]
        return UnsupportedLayer(
            f"target_names: {pattern!r} matches no linear layer, convolution, embedding or experts, only "
            f"{listed(kinds)}{there}"
        )
    return TargetError(f"target_names: {pattern!r} matches no layer{_near(pattern, allowed)}{there}")


def _by_block(model: nn.Module, cfg: AdapterConfig, chosen: dict[str, Place]) -> dict[str, Place]:
    if cfg.layers is None:
        return chosen
    numbers = {name: block_number(model, name) for name in chosen}
    there = sorted({number for number in numbers.values() if number is not None})
    if missing := [number for number in cfg.layers if number not in there]:
        raise TargetError(
            f"layers={list(cfg.layers)}: no target is in block {listed(missing)}; blocks here: {listed(there, 100)}"
        )
    return {name: place for name, place in chosen.items() if numbers[name] in cfg.layers}


def _by_role(model: nn.Module, cfg: AdapterConfig, chosen: dict[str, Place]) -> dict[str, Place]:
    if not cfg.target_roles:
        return chosen
    hidden = hidden_size(model)
    if hidden is None:
        raise TargetError(
            f"target_roles={cfg.target_roles} needs model.config.hidden_size, which {type(model).__name__} has not; "
            "use target_names"
        )
    roles = {name: role_of(name, place.d_in, place.d_out, hidden) for name, place in chosen.items()}
    if unknown := [name for name, role in roles.items() if role == "unknown"]:
        raise TargetError(
            f"target_roles={cfg.target_roles}: the role of {listed(unknown)} cannot be told "
            f"({hidden} → {hidden}, and no known name); narrow target_names or exclude_names so that they are left out"
        )
    for role in cfg.target_roles:
        if role not in roles.values():
            raise TargetError(f"target_roles: no target is a {role}; roles here: {listed(sorted(set(roles.values())))}")
    return {name: place for name, place in chosen.items() if roles[name] in cfg.target_roles}


def _check_per_target(cfg: AdapterConfig, chosen: Places) -> None:
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
