"""What a config of PEFT says of a model's modules: which are adapted, which are trained whole, and what holds of each.

All by PEFT 0.21's own rules; names are compared as sets, so that long lists cost no more than short ones.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from ....contract.errors import AdapterFileError
from ....layers.kinds.embedding import is_embedding
from ....layers.kinds.layer_kinds import is_conv1d, is_plain
from .fields import PER_LAYER, first_of, named
from .patterns import Patterns

ALL_LINEAR = "all-linear"
HEADS = ("score", "classifier")  # of models that classify sequences; "all-linear" leaves them out


class Selection:
    """One config on one model."""

    def __init__(self, config: Mapping[str, Any], model: nn.Module) -> None:
        self.config, self.model = config, model
        self.names = [name for name, _ in model.named_modules() if name]
        self.patterns = Patterns(self.names)
        self._sets: dict[str, frozenset[str]] = {}
        self.weights, self._parameters = self._named()
        self.tokens = self._tokens()

    def adapted(self) -> set[str]:
        """The modules that PEFT would adapt, and the parameters."""
        targets, parameters = self.config.get("target_modules"), self.parameters()
        if targets is None and not parameters:
            raise AdapterFileError("target_modules is missing: give the names of the adapted modules")
        targets = targets or ()
        if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
            targets = self._all_linear()
        chosen = targets if isinstance(targets, str) else frozenset(targets)
        modules = {name for name in self.names if self._chosen(name, chosen) and not self._left_out(name)}
        if twice := sorted(modules.intersection(self.weights)):
            raise AdapterFileError(f"target_modules and target_parameters both select {first_of(twice)}")
        return {*modules, *self.weights, *parameters, *self.tokens}

    def parameters(self) -> list[str]:
        """The parameters of target_parameters that are no layer's own weight, in the model's order."""
        return self._parameters

    def _named(self) -> tuple[dict[str, str], list[str]]:
        """What target_parameters names: layers by their weights' names, and parameters, in the model's order."""
        wanted = self._set("target_parameters") if self.config.get("target_parameters") else frozenset[str]()
        names = [name for name, _ in self.model.named_parameters(remove_duplicate=False)] if wanted else []
        found = [name for name in names if any(end in wanted for end in endings(name))]
        if unmatched := [key for key in wanted if not any(key in endings(name) for name in found)]:
            raise AdapterFileError(f"target_parameters: {first_of(unmatched)} is no parameter of this model")
        weights = {path: name for name in found if (path := name.removesuffix(".weight")) != name and self._whole(path)}
        return weights, [name for name in found if name not in weights.values()]

    def _whole(self, path: str) -> bool:
        """Whether a layer's weight is one matrix as it is."""
        layer = self.model.get_submodule(path)
        return is_plain(layer) or is_conv1d(layer) or is_embedding(layer)

    def _tokens(self) -> dict[str, list[int]]:
        """The embeddings (and heads) whose rows trainable_token_indices trains beside the method."""
        wanted = self.config.get("trainable_token_indices")
        if not wanted:
            return {}
        if isinstance(wanted, dict):
            found = {name: ids for key, ids in wanted.items() for name in self.names if key in endings(name)}
        else:
            try:
                table = self.model.get_input_embeddings()  # type: ignore[operator]
            except (AttributeError, NotImplementedError):
                table = None
            found = {name: wanted for name in self.names if self.model.get_submodule(name) is table}
        if not found:
            raise AdapterFileError(f"{named('trainable_token_indices', wanted)}: this model has no such embedding")
        return found

    def whole(self) -> list[str]:
        """The outermost modules of modules_to_save: PEFT compares ends, also in the middle of a word."""
        found = [name for name in self.names if self._ends("modules_to_save", name)]
        outer = set(found)
        return [name for name in found if not any(prefix in outer for prefix in _prefixes(name))]

    def own(self, path: str) -> dict[str, Any]:
        """The config as it holds of one module: its rank, alpha and λ, and whether it is a feedforward module."""
        if path in self.tokens:
            return {"peft_type": "TRAINABLE_TOKENS", "token_indices": self.tokens[path]}
        changes: dict[str, Any] = {"trainable_token_indices": None} if self.tokens else {}
        known_as = self.weights.get(path, path)
        if "bias" in self.config:  # read already, of all layers
            changes["bias"] = "none"
        for field, table in PER_LAYER.items():
            if field not in self.config:  # methods call their alpha by one of two names
                continue
            for pattern, value in (self.config.get(table) or {}).items():
                if self.patterns.selects(table, pattern, known_as):
                    changes[field] = value
                    break
        if "feedforward_modules" in self.config:
            changes["feedforward_modules"] = self._ends("feedforward_modules", path)
        return {**self.config, **changes}

    def _chosen(self, name: str, targets: str | Collection[str]) -> bool:
        if isinstance(targets, str):
            return self.patterns.fullmatch("target_modules", targets, name)
        return name in targets or (any(end in targets for end in endings(name)) and self._in_blocks(name))

    def _left_out(self, name: str) -> bool:
        excluded = self.config.get("exclude_modules") or ()
        if isinstance(excluded, str):
            if self.patterns.fullmatch("exclude_modules", excluded, name):
                return True
        elif excluded and not self._set("exclude_modules").isdisjoint(endings(name)):
            return True
        saved = self.config.get("modules_to_save") or ()
        return any(self.patterns.contains("modules_to_save", part, name) for part in saved)

    def _ends(self, field: str, name: str) -> bool:
        """Whether the name ends with one of the field's, wherever that begins; a text is a pattern."""
        value = self.config.get(field) or ()
        if isinstance(value, str):
            return self.patterns.fullmatch(field, value, name)
        return bool(value) and any(name[start:] in self._set(field) for start in range(len(name) + 1))

    def _set(self, field: str) -> frozenset[str]:
        """A list of names, for many look-ups."""
        if field not in self._sets:
            self._sets[field] = frozenset(self.config[field])
        return self._sets[field]

    def _in_blocks(self, name: str) -> bool:
        """layers_to_transform and layers_pattern: the first number in the name that a part stands before."""
        blocks = self.config.get("layers_to_transform")
        if blocks is None or blocks == []:
            return True
        lists = self.config.get("layers_pattern") or ()
        parts = name.split(".")
        number = next(self._numbers(parts, [lists] if isinstance(lists, str) else lists), None)
        return number is not None and (number == blocks if isinstance(blocks, int) else number in blocks)

    def _numbers(self, parts: list[str], lists: Collection[str]) -> Iterator[int]:
        places = [i for i in range(1, len(parts) - 1) if parts[i].isdecimal()]
        if not lists:
            yield from (int(parts[i]) for i in places if i > 1)
        for pattern in lists:
            if not re.fullmatch(r"[\w.-]+", pattern):
                raise AdapterFileError(f"{named('layers_pattern', pattern)}: give the name of a list of blocks")
            yield from (int(parts[i]) for i in places if f".{'.'.join(parts[:i])}".endswith(f".{pattern}"))

    def _all_linear(self) -> list[str]:
        """nn.Linear and Conv1D, without the head."""
        try:
            heads = [self.model.get_output_embeddings()]  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            heads = [None]
        if heads == [None] and self.config.get("task_type") == "SEQ_CLS":
            heads = [getattr(self.model, name, None) for name in HEADS]
        layers = [
            (name, module)
            for name, module in self.model.named_modules()
            if name and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        ]
        return [name for name, module in layers if not any(module is head for head in heads)]


def check_complete(selection: Selection, held: Collection[str]) -> None:
    """Raise AdapterFileError unless the tensors are those of the very modules that the config selects."""
    wanted = selection.adapted()
    names = [*selection.names, *selection.parameters()]
    if missing := [name for name in names if name in wanted and name not in held]:
        raise AdapterFileError(
            f"the config selects {len(wanted):,} modules of this {type(selection.model).__name__}, and there is no "
            f"tensor of {first_of(missing)}; the folder is not complete, or not for this model"
        )
    if extra := [name for name in held if name not in wanted]:
        raise AdapterFileError(
            f"there are tensors of {first_of(extra)}, which the config does not select; PEFT would leave them out"
        )


def endings(name: str) -> Iterator[str]:
    """The name, and what follows each of its dots."""
    yield name
    for place, char in enumerate(name):
        if char == ".":
            yield name[place + 1 :]


def _prefixes(name: str) -> Iterator[str]:
    """What stands before each of the name's dots."""
    return (name[:place] for place, char in enumerate(name) if char == ".")
