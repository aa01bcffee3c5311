"""What is chosen for all adapters of a model, for good and by the with-blocks that we are in, and how layers get it.

There is one answer to what acts at any moment: the lasting choice, changed by the open blocks in the order in which
they were entered. `settle` puts it on the layers; whoever comes last, in whatever thread, sees the last state of it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from ...layers.shards import reshard
from ..layer_hooks.layer_state import targets_on
from ..layer_hooks.putting import set_acting
from ..records import Record, records_of


@dataclass(frozen=True)
class Acting:
    """names      of the adapters that act, in their order
    whole      of those whose modules, trained whole, are in their places
    strengths  of those that are scaled: a tensor with one number, or one a row of the batch
    rows       of the batch that each adapter acts on (`BatchRows`); None: all
    """

    names: tuple[str, ...]
    whole: tuple[str, ...]
    strengths: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Any = None

    def same_as(self, other: Acting) -> bool:
        """Tensors are compared by what they are, not by their values."""
        same = (self.names, self.whole, id(self.rows)) == (other.names, other.whole, id(other.rows))
        return same and _ids(self.strengths) == _ids(other.strengths)


Change = Callable[[Acting], Acting]


@dataclass(eq=False)
class Block:
    """A with-block that we are in: its name for messages, and what it changes."""

    kind: str
    change: Change


def without(names: Iterable[str], *, whole_stays: bool = False) -> Change:
    """These adapters do not act; `whole_stays`: what they train whole stays in its place."""
    gone = frozenset(names)

    def change(acting: Acting) -> Acting:
        left = tuple(name for name in acting.names if name not in gone)
        whole = acting.whole if whole_stays else tuple(name for name in acting.whole if name not in gone)
        return replace(acting, names=left, whole=whole)

    return change


def only(names: Sequence[str]) -> Change:
    """These act, in this order, and no others."""
    return lambda acting: replace(acting, names=tuple(names), whole=tuple(names))


def scaled(strengths: Mapping[str, Tensor]) -> Change:
    """These adapters have this strength; others stay as they are."""
    return lambda acting: replace(acting, strengths={**acting.strengths, **strengths})


def on_rows(names: Sequence[str], rows: Any) -> Change:
    """These act, each on its rows, and no others."""
    return lambda acting: replace(acting, names=tuple(names), rows=rows)


def acting_on(model: nn.Module) -> Acting:
    """What acts now, by the lasting choice and the open blocks."""
    acting = lasting_on(model)
    records = records_of(model)
    for block in [*records.blocks]:
        acting = block.change(acting)
    there = records.adapters
    names = tuple(name for name in acting.names if name in there)
    return replace(acting, names=names, whole=tuple(name for name in acting.whole if name in there))


def lasting_on(model: nn.Module) -> Acting:
    """What acts outside of all blocks: what was chosen, or all adapters in attach order."""
    records = records_of(model)
    return Acting(records.lasting, records.lasting, records.strengths)


def settle(model: nn.Module) -> None:
    """Have the layers, and the places of modules that are trained whole, do what acts now. May be repeated."""
    while True:
        now, lasting = acting_on(model), lasting_on(model)
        for module in model.modules():
            for target in targets_on(module):
                target.strength = now.strengths.get(target.adapter)
                target.lasting_strength = lasting.strengths.get(target.adapter)
            set_acting(module, now.names, lasting.names, now.rows)
        _put_whole(model, now.whole)
        if acting_on(model).same_as(now):
            return


@contextmanager
def inside(model: nn.Module, kind: str, change: Change) -> Generator[None]:
    """A with-block of this kind. Blocks may nest and overlap: what is left is what the others make of it."""
    block = Block(kind, change)
    try:
        try:
            enter(model, block)
            yield
        finally:  # twice, so that an interrupt in the first is made good by the second
            leave(model, block)
    finally:
        leave(model, block)


def enter(model: nn.Module, block: Block) -> None:
    records_of(model).blocks.append(block)
    settle(model)


def leave(model: nn.Module, block: Block) -> None:
    """May be repeated, and without `enter` before."""
    blocks = records_of(model).blocks
    blocks[:] = [one for one in blocks if one is not block]
    settle(model)


def _put_whole(model: nn.Module, names: Sequence[str]) -> None:
    records = {name: record for name, record in records_of(model).adapters.items() if record.whole}
    if not records:
        return
    from ..targets.train_modules import put_base, put_trained

    reshard(model)
    for act, wanted in ((put_base, False), (put_trained, True)):  # the base's first: two may have one place
        for name, record in records.items():
            if (name in names) == wanted:
                act(model, record)


def sharing_a_place(records: Mapping[str, Record], names: Iterable[str]) -> tuple[str, str, str] | None:
    """Two of these adapters, and what both train whole."""
    owners: dict[str, str] = {}
    for name in names:
        for key in records[name].whole if name in records else ():
            if key in owners:
                return owners[key], name, key
            owners[key] = name
    return None


def _ids(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: id(tensor) for name, tensor in tensors.items()}
