"""Which adapters of a model act, in which order, how strong, and on which rows of a batch."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...contract.errors import AdapterNameError, ConfigError, ModelStateError
from ..records import RECORDS, check_outside, names_of, record_of, records_of
from .activity import inside, on_rows, only, scaled, settle, sharing_a_place, without

Strength = float | Tensor


def activate(model: nn.Module, *names: str) -> None:
    """From now on these adapters act, in this order, and no others; without a name, none.

    Adapters that are attached or loaded later act as well, after them. Nothing else changes: `requires_grad` of no
    tensor, and nothing that is saved. Modules that an adapter trains whole (`train_modules`) are in their places while
    it is active. For the whole process. Raises AdapterNameError for a name that is not attached or stands twice,
    ModelStateError where two of them train one module, or inside `merged`.
    """
    _checked(model, names)
    check_outside(model, "merged")
    vars(model)[RECORDS] = replace(records_of(model), chosen=tuple(names))
    settle(model)


@contextmanager
def active(model: nn.Module, *names: str) -> Generator[None]:
    """Inside, these adapters act, in this order, and no others; for the whole process: other threads see it, too.

    Blocks of this and of the other kinds may nest and overlap: what acts is what `activate` says, changed by the open
    blocks in the order in which they were entered. Raises what `activate` does.
    """
    _checked(model, names)
    check_outside(model, "merged")
    with inside(model, "active", only(names)):
        yield


@contextmanager
def disabled(model: nn.Module, name: str | None = None) -> Generator[None]:
    """Inside, the model computes without one adapter, or without all of them (None); for the whole process, so that
    other threads see it, too. Blocks may nest and overlap: an adapter runs again when the last of its blocks is left.

    Raises AdapterNameError when there is none.
    """
    names = names_of(model, name)
    check_outside(model, "merged")
    with inside(model, "disabled", without(names)):
        yield


@contextmanager
def strength(model: nn.Module, strengths: Mapping[str, Strength]) -> Generator[None]:
    """Inside, adapters have these strengths: `with strength(model, {"style": 0.5, "detox": -1.0})`.

    The effect of an adapter on a layer is scaled: y + s · (y_adapted − y), and x + s · (x_adapted − x) for one that
    changes the input; 0 is the base bit for bit, 1 the adapter. A strength is a number, of any sign, or a tensor with
    one number, or with one for each row of the batch. A compiled model is not compiled again when the number changes.
    For the whole process; merge and export respect it (one number). Raises AdapterNameError, ConfigError for what is
    no strength, ModelStateError for an adapter that trains whole modules.
    """
    given = _strengths(model, strengths)
    with inside(model, "strength", scaled(given)):
        yield


def set_strength(model: nn.Module, strengths: Mapping[str, Strength | None]) -> None:
    """From now on adapters have these strengths, as inside `strength`; None: the adapter as it is. Saved nowhere.

    Raises what `strength` does.
    """
    given = _strengths(model, {name: value for name, value in strengths.items() if value is not None})
    for name in strengths:
        record_of(model, name)
    records = records_of(model)
    kept = {name: value for name, value in records.strengths.items() if name not in strengths}
    vars(model)[RECORDS] = replace(records, strengths={**kept, **given})
    settle(model)


@contextmanager
def routed(model: nn.Module, names: Sequence[str | None]) -> Generator[None]:
    """Inside, each row of a batch has the one adapter that is named for it, or none (None):

        with routed(model, ["style", None, "detox"]):
            model(**batch_of_three_rows)

    In training and in generation (with beams, too, whose rows stand beside each other), for every variant and mixtures
    of variants: each row as if it were run alone with its adapter. Rows of one adapter are run together; adapters of
    one variant, config and size in one batched product where each has few rows; without gradients, their tensors are
    put beside each other once in a block, and anew when one of them is written (not through `.data`, which torch does
    not count). Strengths hold. For the whole process.

    Raises AdapterNameError for unknown names, ConfigError for what is no list of names, ModelStateError for adapters
    that train whole modules, and at the call, when the batch has another number of rows, or for fused experts.
    """
    if isinstance(names, str) or not names or not all(name is None or isinstance(name, str) for name in names):
        raise ConfigError(
            f"routed: {names!r}; give a list with the name of an adapter, or None, for each row of the batch"
        )
    there = names_of(model, None)
    for name in dict.fromkeys(name for name in names if name is not None):
        if record_of(model, name).whole:
            raise ModelStateError(
                f"adapter '{name}' trains {next(iter(record_of(model, name).whole))} whole, which is one for the whole "
                "batch; run the rows of each adapter apart, with active(model, …)"
            )
    check_outside(model, "merged")
    from ..layer_hooks.batch_rows import BatchRows

    rows = BatchRows(tuple(names))
    with inside(model, "routed", on_rows([name for name in there if name in rows.rows], rows)):
        yield


def _checked(model: nn.Module, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        record_of(model, name)
        if name in seen:
            raise AdapterNameError(f"'{name}' stands twice; an adapter acts once")
        seen.add(name)
    if shared := sharing_a_place(records_of(model).adapters, names):
        first, second, key = shared
        raise ModelStateError(f"adapters '{first}' and '{second}' both train {key} whole; one of them can be active")


def _strengths(model: nn.Module, strengths: Mapping[str, Strength]) -> dict[str, Tensor]:
    check_outside(model, "merged")
    found: dict[str, Tensor] = {}
    for name, value in strengths.items():
        if record_of(model, name).whole:
            raise ModelStateError(
                f"adapter '{name}' trains {next(iter(record_of(model, name).whole))} whole, which has no strength; "
                "activate(model, …) switches it"
            )
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        tensor = isinstance(value, Tensor) and value.dim() <= 1 and value.is_floating_point() and value.numel() > 0
        if not (number or tensor):
            raise ConfigError(
                f"strength of '{name}': {value!r}; give a finite number, or a tensor of floating point with one number "
                "or one for each row of the batch"
            )
        found[name] = value.detach().clone() if isinstance(value, Tensor) else torch.tensor(float(value))
    return found
