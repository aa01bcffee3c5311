"""Which variant reads the layers of a folder, and what it makes of them."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...attached.targets.places import Place, layer_or_norm
from ...attached.targets.targeting import located
from ...attached.tensors.declared import shared_key, specs_for
from ...contract.errors import AdapterFileError, ConfigError, LoraLiteError, listed
from ...contract.target import Target
from ...contract.text import normal, plain, told
from ...contract.variant import Hook, Variant
from ...discovery.entry_points import Entry
from ...discovery.name_conflicts import FIRST_PARTY, state_of
from ...discovery.registry import get_variant, registered, variant_entries
from ...discovery.source_reading import read_source
from ...layers.kinds.experts import expert
from .config_json.fields import BEGAN, CONFIG, IN_PEFT, Tracked, check_all_read, first_of, named, shown
from .config_json.selection import Selection
from .tensor_forms.for_all import TOP
from .tensor_forms.starts import WAY_OUT, changes_weight, check_start_read, with_start


@dataclass
class Part:
    """What one variant makes of a folder: its targets, not called by the adapter's name yet, and their tensors."""

    variant: Variant
    targets: list[Target] = field(default_factory=list)
    values: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(
        default_factory=dict
    )  # what several layers have in common, by its name on the model

    def add(self, target: Target, values: dict[str, Tensor]) -> None:
        for bare, spec in specs_for(target).items():
            if spec.shared and not torch.equal(self.shared.setdefault(shared_key(spec), values[bare]), values[bare]):
                raise AdapterFileError(
                    f"{target.name}: {bare} differs from that of another layer, and variant '{self.variant.name}' has "
                    f"one for both, {shared_key(spec)}\n  {IN_PEFT}"
                )
        self.targets.append(target)
        self.values[target.name] = values


class Readers:
    """The variants that have a from_peft, imported one after the other as they are asked: those of this project first,
    then those registered by hand, then the others, which are not even looked at where one before has read all. A
    package that cannot be imported is left out."""

    def __init__(self, peft_type: str) -> None:
        entries = variant_entries()
        usable = [entry for entry in entries if state_of(entry, entries)[0] == "ok"]
        ours = [entry for entry in usable if FIRST_PARTY.get(entry.name) == normal(entry.package.name)]
        ours.sort(key=lambda entry: (entry.name != peft_type.lower(), entry.name))
        others = sorted((entry for entry in usable if entry not in ours), key=lambda entry: entry.name)
        self._waiting: list[Entry | Variant] = [*ours, *registered().values(), *others]
        self._variants: list[Variant] = []
        self.broken: list[str] = []

    def __iter__(self) -> Iterator[Variant]:
        yield from tuple(self._variants)
        while self._waiting:
            variant = self._next()
            if variant is not None and variant.from_peft is not None:
                self._variants.append(variant)
                yield variant

    def _next(self) -> Variant | None:
        one = self._waiting.pop(0)
        if isinstance(one, Variant):
            return one
        try:
            return get_variant(one.name) if _may_read(one.value) else None
        except Exception as error:  # what Python's parser raises, and of what is imported
            self.broken.append(f"{plain(one.name)} ({plain(told(error).partition(chr(10))[0], 200)})")
            return None


def _may_read(module: str) -> bool:
    """Whether the module's source binds from_peft, without importing it; of a compiled one that cannot be told."""
    tree, size = read_source(module)
    return not size or any("from_peft" in _bound(node) for node in ast.walk(tree))


def _bound(node: ast.AST) -> tuple[str | None, ...]:
    if isinstance(node, ast.FunctionDef):
        return (node.name,)
    if isinstance(node, ast.Name):
        return (node.id,) if isinstance(node.ctx, ast.Store) else ()
    return (node.asname or node.name,) if isinstance(node, ast.alias) else ()


def read_parts(
    selection: Selection,
    layers: Mapping[str, Mapping[str, Tensor]],
    tied: Mapping[str, Sequence[str]],
    common: Mapping[str, Tensor],
    trainable: bool,
) -> list[Part]:
    """Each layer's tensors, and those that there are once for all, read by the first variant that knows them; those
    that are tied to a layer read the same. Raises AdapterFileError."""
    readers = Readers(selection.config["peft_type"])
    parts: dict[str, Part] = {}
    pairs = [(path, one, {**layers[path], **common}) for path in layers for one in (path, *tied.get(path, ()))]
    places = {path: place for _, path, _ in pairs if (place := layer_or_norm(selection.model, path))}
    sizes = {path: (place.d_in, place.d_out) for path, place in places.items()}
    for leader, path, held in pairs:
        config, place = {**selection.own(leader), "$tied": bool(tied.get(leader))}, places[path]
        config, tensors = with_start(config, selection.model, path, place, held)
        failure: AdapterFileError | None = None
        for variant in readers:
            try:
                made = _ask(variant, path, place, Tracked(config), Tracked(tensors), sizes, trainable)
            except AdapterFileError as error:
                if FIRST_PARTY.get(variant.name) == normal(variant.distribution):
                    raise
                failure = failure or error  # of a stranger's variant: another may know better
                continue
            if made is not None:
                parts.setdefault(variant.name, Part(variant)).add(*made)
                break
        else:
            raise failure or _unread(path, config, tensors, readers)
    return list(parts.values())


def _ask(
    variant: Variant,
    path: str,
    place: Place,
    config: Tracked[Any],
    tensors: Tracked[Tensor],
    sizes: Mapping[str, tuple[int, int]],
    trainable: bool,
) -> tuple[Target, dict[str, Tensor]] | None:
    """The layer as this variant's target and its values, checked; None if the variant does not know such tensors."""
    assert variant.from_peft is not None
    try:
        try:
            made = _made(variant.from_peft, place, tensors, {"config": config, "name": path, "sizes": sizes})
        except ConfigError as error:  # what PEFT computes and this variant does not
            raise ConfigError(f"{error}\n  {IN_PEFT}") from error
        if made is None:
            return None
        fields, values = made
        check_all_read(config, variant.name, trainable)
        check_start_read(config, variant.name, BEGAN in config.read)
        if ignored := [name for name in tensors if name not in tensors.read]:
            raise ConfigError(f"{first_of(ignored)} is nothing that variant '{variant.name}' reads")
        target = located(path, place, variant.Config(exclude_names=(), **fields), variant, "")
        return target, _checked(target, dict(values))
    except LoraLiteError as error:
        about = str(error).removeprefix(f"{path}: ")
        raise AdapterFileError(f"{path}: {about}") from error
    except KeyError as error:
        raise AdapterFileError(
            f"{path}: {error} is missing, in {CONFIG} or among its tensors {first_of(tensors)}"
        ) from error
    except Exception as error:  # values of a kind that nobody has thought of, or a mistake in the variant
        raise AdapterFileError(
            f"{path}: variant '{variant.name}' cannot read its fields and tensors {first_of(tensors)}: "
            f"{plain(told(error))}"
        ) from error


def _made(
    from_peft: Hook, place: Place, tensors: Tracked[Tensor], about: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """What a variant makes of a layer's fields and tensors; of experts, of each of them, in stacks again."""
    if not place.experts:
        return from_peft({"tensors": tensors, "layer": place.layer, **about})
    fields: dict[str, Any] = {}
    each: list[dict[str, Tensor]] = []
    for index in range(place.experts):
        own = Tracked({name: _of_one(name, dict.__getitem__(tensors, name), index) for name in tensors})
        made = from_peft({"tensors": own, "layer": expert(place.layer, place.part, index), **about})
        if made is None:
            return None
        fields = made[0]
        each.append(made[1])
        tensors.read |= own.read
    return fields, {bare: torch.stack([values[bare] for values in each]) for bare in each[0]}


def _of_one(name: str, tensor: Tensor, index: int) -> Tensor:
    return tensor if name.startswith(TOP) else tensor[index]


def _checked(target: Target, values: dict[str, Tensor]) -> dict[str, Tensor]:
    name, specs = target.variant.name, specs_for(target)
    wanted = {bare: spec.shape for bare, spec in specs.items() if spec.persistent}
    given = {bare: tuple(tensor.shape) for bare, tensor in values.items()}
    if given != wanted:
        raise ConfigError(f"its tensors are {given} for {name}, which needs {wanted}")
    for bare, value in values.items():
        dtype = specs[bare].dtype or torch.float32
        if value.dtype != dtype and not (value.is_floating_point() and dtype.is_floating_point):
            raise ConfigError(f"{bare} is {value.dtype} for {name}, which needs {dtype}")
    return values


def _unread(path: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], readers: Readers) -> AdapterFileError:
    hint = f"\n  with {named(BEGAN, config[BEGAN])}; {WAY_OUT}" if changes_weight(config) else ""
    broken = f"\n  left out, because they cannot be imported: {listed(readers.broken)}" if readers.broken else ""
    return AdapterFileError(
        f"no installed variant reads peft_type {shown(config['peft_type'])} with {first_of(tensors)} ({path}){hint}\n"
        f"  variants that read PEFT's files: {listed((variant.name for variant in readers), 20)}{broken}\n  {IN_PEFT}"
    )
