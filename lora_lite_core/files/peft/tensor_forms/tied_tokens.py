"""Rows of an embedding that PEFT trains, and the heads that are tied to it: one tensor, in its files and here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ....contract.errors import AdapterFileError
from ....contract.target import Target

ROWS = "trainable_tokens_delta"


def tied_to(model: nn.Module, path: str) -> list[str]:
    """Other modules whose weight is the very one of this embedding."""
    weight = model.get_submodule(path)._parameters.get("weight")
    return [
        name
        for name, module in model.named_modules()
        if name != path and weight is not None and module._parameters.get("weight") is weight
    ]


def leave_to_leaders(model: nn.Module, layers: dict[str, dict[str, Tensor]]) -> dict[str, list[str]]:
    """The modules that are tied to each embedding with rows in the file. PEFT writes their rows a second time, or not:
    here they are taken out. Raises AdapterFileError where they differ."""
    found: dict[str, list[str]] = {}
    for path in [path for path, tensors in layers.items() if any(name.endswith(ROWS) for name in tensors)]:
        if path not in layers or not isinstance(model.get_submodule(path), nn.Embedding):
            continue
        found[path] = tied_to(model, path)
        for other in [other for other in found[path] if other in layers]:
            pairs = zip(layers[path].values(), layers[other].values(), strict=False)
            if not all(torch.equal(a, b) for a, b in pairs):
                raise AdapterFileError(f"{path} and {other} are tied in this model, and their rows in the file differ")
            del layers[other]
    return found


def leaders(targets: Mapping[str, Target]) -> dict[str, Target]:
    """The targets without those that follow an embedding they are tied to, with the same tensors."""
    tables = [target for target in targets.values() if isinstance(target.layer, nn.Embedding)]
    return {path: target for path, target in targets.items() if not _follows(target, tables)}


def _follows(target: Target, tables: Iterable[Target]) -> bool:
    if isinstance(target.layer, nn.Embedding) or not target.shared:
        return False
    weight = target.layer._parameters.get("weight")
    names = {one.attribute for one in target.shared.values()}
    return any(
        table.layer._parameters["weight"] is weight and {one.attribute for one in table.shared.values()} == names
        for table in tables
    )
