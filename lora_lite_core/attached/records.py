"""What a model remembers of its adapters, names and order, on the model itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..contract.config import AdapterConfig
from ..contract.errors import AdapterNameError, ModelStateError, did_you_mean, listed
from ..contract.target import Target
from ..contract.variant import Variant
from ..layers.rollback import AllOrNothing
from .layer_hooks.layer_state import targets_on

RECORDS = "_lora_lite_adapters"


@dataclass
class Whole:
    """A tensor of the base that an adapter trains as a copy; the one that is not in its place waits here."""

    base: Tensor
    trained: Tensor | None  # None while it is in place
    shard: Tensor | None = None  # of the trained one, while a sharded place has the base's values

    @classmethod
    def trained_from(cls, base: Tensor, values: Tensor) -> Whole:
        """A trainable copy of the base's tensor, with these values."""
        copy = base.detach().clone().copy_(values.detach())
        return cls(base, nn.Parameter(copy) if isinstance(base, nn.Parameter) else copy)


@dataclass
class Record:
    """What the model remembers of one adapter; what there is to know of each layer stands on the layer (`Target`)."""

    variant: Variant
    cfg: AdapterConfig
    seed: int
    ready: bool = True  # False from `attach` on the meta device until `initialize`
    layers: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()  # attributes of the model: tensors that several layers share
    whole: dict[str, Whole] = field(default_factory=dict)  # by full name: what `train_modules` trains
    step: int = 0  # of the optimizer that `follow` was given
    follower: object = None  # the hook of that optimizer
    reminded: bool = False  # of `follow`
    versions: int | None = None  # torch's count of writes to what is trained, at the last forward in training mode

    @property
    def in_place(self) -> bool:
        """Whether what is trained whole is where it belongs; the base's is there while it is not."""
        return all(whole.trained is None and whole.shard is None for whole in self.whole.values())

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles."""
        return {**vars(self), "follower": None, "versions": None}


@dataclass(frozen=True)
class Records:
    """On the model, replaced as a whole: its adapters by name, what `attach` turned off, and handles of its hooks."""

    adapters: dict[str, Record] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()  # names of parameters
    unpacked: tuple[str, ...] = ()  # names of 4-bit layers whose packing flag was on
    handles: Mapping[str, Any] = field(default_factory=dict)  # by what the hook is for
    calls: Any = None  # what the model is called with (`Calls`), where an adapter asks for it
    chosen: tuple[str, ...] | None = None  # the adapters that act for good, in their order; None: all, as attached
    strengths: Mapping[str, Tensor] = field(default_factory=dict)  # of adapters that are scaled for good
    blocks: list[Any] = field(default_factory=list)  # the with-blocks that we are in (`Block`), as entered; one list

    @property
    def lasting(self) -> tuple[str, ...]:
        """The adapters that act outside of all with-blocks, in their order."""
        return tuple(self.adapters) if self.chosen is None else self.chosen

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: a copy is outside of the with-blocks that the original is in."""
        for name, record in self.adapters.items() if self.blocks else ():
            if record.whole and record.in_place != (name in self.lasting):
                raise ModelStateError(
                    f"a copy made inside `with {self.blocks[-1].kind}(model)` would keep the wrong "
                    f"{next(iter(record.whole))} in its place, which adapter '{name}' trains; leave that block first"
                )
        return {**vars(self), "blocks": []}


def records_of(model: nn.Module) -> Records:
    if not isinstance(model, nn.Module):
        raise ModelStateError(f"the first argument is the model, an nn.Module, not {type(model).__name__}")
    return model.__dict__.get(RECORDS) or Records()


def names_of(model: nn.Module, name: str | None) -> list[str]:
    """The one name, or all of them for None; AdapterNameError when there is none."""
    names = [name] if name is not None else list(records_of(model).adapters)
    for one in names or ["default"]:
        record_of(model, one)
    return names


def record_of(model: nn.Module, name: str) -> Record:
    records = records_of(model).adapters
    if name in records:
        return records[name]
    inner = [path for path, module in model.named_modules() if path and RECORDS in module.__dict__]
    hint = f"\n  submodule '{inner[0]}' carries adapters: pass model.{inner[0]}" if inner else ""
    near = did_you_mean(str(name), records)
    only = f"; give name='{next(iter(records))}'" if len(records) == 1 and not near else ""
    raise AdapterNameError(f"no adapter is called '{name}'{near}{only}\n  attached: {listed(records)}{hint}")


def present_targets(model: nn.Module, name: str) -> dict[str, Target | None]:
    """The adapter's targets by layer; None where the user has removed or replaced the layer since."""
    found: dict[str, Target | None] = {}
    for path in record_of(model, name).layers:
        on_layer, part = targets_under(model, path)
        found[path] = next((one for one in on_layer if one.adapter == name and one.part == part), None)
    return found


def targets_under(model: nn.Module, path: str) -> tuple[tuple[Target, ...], str]:
    """What stands on the layer of that name, and "", or on the owner of the parameter of that name, and its own."""
    owner, _, part = path.rpartition(".")
    for name, rest in ((path, ""), (owner, part)):
        try:
            return targets_on(model.get_submodule(name)), rest
        except AttributeError:
            continue
    return (), ""


def targets_of(model: nn.Module, name: str) -> dict[str, Target]:
    """The adapter's targets by layer; ModelStateError when one of its layers was removed or replaced since."""
    found = present_targets(model, name)
    whole = {path for path, target in found.items() if target is not None}
    if gone := [path for path in found if path not in whole]:
        raise ModelStateError(
            f"adapter '{name}' is not whole any more: {listed(gone, 3)} was removed or replaced after it was attached\n"
            f"  detach(model, '{name}') takes the rest of it off; change the model first, then attach or load"
        )
    return {path: target for path, target in found.items() if target is not None}


def all_or_nothing(model: nn.Module, undo: Callable[[], object] | None = None) -> AllOrNothing:
    """A with-block after which, if it fails, the model is as before: what waits in its records and the packing flags
    of 4-bit layers included."""
    records = records_of(model)
    waiting = [whole.base for record in records.adapters.values() for whole in record.whole.values()]

    def undo_all() -> None:
        let_pack(model, records.unpacked, False)
        if undo is not None:
            undo()

    return AllOrNothing(model, waiting, undo_all)


def let_pack(model: nn.Module, names: Sequence[str], flag: bool) -> None:
    """Turn the packing flags of these 4-bit layers on or off."""
    if names:
        from ..layers.four_bit_packing import let_pack as set_flags

        set_flags(model, names, flag)


def check_outside(model: nn.Module, *blocks: str) -> None:
    """Raise ModelStateError inside one of these blocks ("disabled", "merged", "active", "strength", "routed"); none
    given: any."""
    for block in sorted({block.kind for block in records_of(model).blocks}, reverse=True):
        if not blocks or block in blocks:
            raise ModelStateError(f"not inside `with {block}(model)`: leave that block first")


def check_one_owner(model: nn.Module) -> None:
    """Raise ModelStateError when adapters were attached through another module than this one."""
    ours = records_of(model).adapters
    for path, module in model.named_modules():
        if path and RECORDS in module.__dict__:
            raise ModelStateError(f"submodule '{path}' carries adapters of its own; attach to one and the same module")
        for target in targets_on(module):
            if target.adapter not in ours:
                raise ModelStateError(
                    f"'{path}' carries adapter '{target.adapter}', which was attached through an enclosing module; "
                    "attach to that one"
                )


def check_name(model: nn.Module, name: str, variant: Variant | None = None) -> None:
    """Raise AdapterNameError for a name that cannot be one or is taken; an adapter of this variant that was attached on
    meta and has no values yet does not count."""
    if not isinstance(name, str) or not name.isidentifier() or "__" in name:
        raise AdapterNameError(
            f"{name!r} is not an adapter name; use letters, digits and single underscores, as in 'style_2'"
        )
    taken = records_of(model).adapters
    if name not in taken:
        return
    there = taken[name]
    if variant is None or there.ready:
        raise AdapterNameError(
            f"an adapter called '{name}' is attached already; detach(model, '{name}') first, or give another name\n"
            f"  attached: {listed(taken)}"
        )
    if there.variant.name != variant.name:
        raise AdapterNameError(
            f"adapter '{name}' was attached on meta as '{there.variant.name}', this is a '{variant.name}'; "
            f"give another name, or detach(model, '{name}') first"
        )
