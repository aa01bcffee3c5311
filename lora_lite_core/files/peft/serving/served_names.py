"""By what names the model that is served knows the adapted layers: servers take no notice of names they do not have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ....contract.errors import ConfigError, MergeError, did_you_mean, listed
from ....contract.target import Target
from ....contract.text import told
from ....layers.kinds.layer_kinds import target_sizes

Sizes = tuple[int, ...]


def served_model(served: nn.Module | type | str, model: nn.Module) -> nn.Module:
    """The model that is served, on meta unless it is one already: a class of transformers, or its name, is made from
    the config of `model`. Raises ConfigError where that cannot be."""
    if isinstance(served, nn.Module):
        return served
    kind: Any = _by_name(served) if isinstance(served, str) else served
    config: Any = getattr(model, "config", None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ConfigError(f"served={served!r}: give a model's class, the name of one of transformers', or a model")
    if config is None:
        raise ConfigError(f"served={kind.__name__}: this {type(model).__name__} has no config to make one from")
    wanted: Any = getattr(kind, "config_class", None)
    text = getattr(config, "get_text_config", lambda: config)()
    fitting = next((one for one in (config, text) if wanted and isinstance(one, wanted)), None)
    if wanted and fitting is None:
        raise ConfigError(
            f"served={kind.__name__} is made from a {wanted.__name__}, and this {type(model).__name__} has a "
            f"{type(config).__name__}; give the class that the server's config.json names under 'architectures'"
        )
    try:
        with torch.device("meta"):
            return kind(fitting or config)
    except Exception as error:  # whatever a model's class makes of the config
        raise ConfigError(f"served={kind.__name__} cannot be made from this model's config: {told(error)}") from error


def served_names(model: nn.Module, targets: Mapping[str, Target], served: nn.Module) -> dict[str, str]:
    """Each target's path in the served model: the same, or the one of a layer (or fused parameter) of equal sizes that
    differs by what wraps it alone: `layers.0.fc`, `model.layers.0.fc`, `language_model.model.layers.0.fc`.

    Raises MergeError with the names that there are where the served model has none, or no single one.
    """
    own, places = dict(_places(model)), dict(_places(served))
    found: dict[str, str] = {}
    for path, target in targets.items():
        sizes = _sizes(target)
        name = path if places.get(path) == sizes else _wrapped(path, sizes, own, places)
        if name is None:
            raise MergeError(_absent(path, sizes, places, served))
        if name in found.values():
            raise MergeError(f"{path} and another layer would both be '{name}' in the served {type(served).__name__}")
        found[path] = name
    return found


def _wrapped(path: str, sizes: Sizes, own: Mapping[str, Sizes], places: Mapping[str, Sizes]) -> str | None:
    """The longest ending that one layer of equal sizes has in each of the two models, in wrappings of one kind."""
    parts = path.split(".")
    for start in range(len(parts)):
        ending = "." + ".".join(parts[start:])
        fitting = [name for name, size in places.items() if size == sizes and f".{name}".endswith(ending)]
        if not fitting:
            continue
        alike = [name for name, size in own.items() if size == sizes and f".{name}".endswith(ending)]
        before, behind = set(parts[:start]), set(fitting[0].split(".")[: -len(parts[start:])])
        one_kind = before <= behind or behind <= before
        return fitting[0] if len(fitting) == len(alike) == 1 and one_kind else None
    return None


def _absent(path: str, sizes: Sizes, places: Mapping[str, Sizes], served: nn.Module) -> str:
    last = path.rpartition(".")[2]
    inner = [name for name in places if name.rpartition(".")[2] == last]
    return (
        f"the served {type(served).__name__} has no single layer that is {path} ({' × '.join(map(str, sizes))})"
        f"{did_you_mean(path, places)}\n  called '{last}' there: {listed(inner, 4)}\n"
        "  a server would load the adapter and leave this layer out; attach to the class that is served"
    )


def _places(model: nn.Module) -> Iterator[tuple[str, Sizes]]:
    for path, module in model.named_modules(remove_duplicate=False):
        if sizes := target_sizes(module):
            yield path, sizes
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.ndim == 3:  # of fused experts
            yield path, tuple(parameter.shape)


def _sizes(target: Target) -> Sizes:
    if target.part:
        return tuple(target.layer.get_parameter(target.part).shape)
    return target_sizes(target.layer) or (target.d_in, target.d_out)


def _by_name(name: str) -> type:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"served={name!r}: a name takes transformers; type: pip install transformers") from error
    found = getattr(transformers, name, None)
    if not isinstance(found, type):
        near = did_you_mean(name, (one for one in dir(transformers) if one.endswith(("LM", "Generation", "Model"))))
        raise ConfigError(f"served={name!r}: transformers has no such class{near}")
    return found
