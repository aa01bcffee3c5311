"""Batches whose rows belong to different adapters: those of one are run together, and put back in their places."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...contract.errors import ModelStateError
from ...contract.target import Target
from ...contract.variant import Hook
from .layer_state import LayerState, blended, run

BATCHED_FROM = 4  # adapters of a kind: fewer are run one after the other


class _Stack(NamedTuple):
    """The tensors of many adapters as one, and what they were made of."""

    of: list[Tensor]
    versions: list[int]
    params: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class BatchRows:
    """The adapter of each row of a batch, or None."""

    names: tuple[str | None, ...]
    rows: dict[str, Tensor] = field(init=False)  # of each adapter: numbers of its rows
    stacks: dict[Any, _Stack] = field(default_factory=dict)  # tensors of many adapters, while nothing is trained

    def __post_init__(self) -> None:
        found: dict[str, list[int]] = {}
        for number, name in enumerate(self.names):
            if name is not None:
                found.setdefault(name, []).append(number)
        object.__setattr__(self, "rows", {name: torch.tensor(numbers) for name, numbers in found.items()})

    def of(self, name: str, length: int, layer: str, device: torch.device) -> Tensor:
        """The rows of an adapter in a tensor whose first dimension holds each row of the batch a number of times in
        sequence: beams, or the tokens of a flattened batch."""
        times, rest = divmod(length, len(self.names))
        if rest or not times:
            raise ModelStateError(
                f"routed names an adapter for each of {len(self.names)} rows, and {layer} got {length} in its first "
                "dimension; give one name, or None, for each row of the batch"
            )
        rows = self.rows[name].to(device)
        return rows if times == 1 else (rows[:, None] * times + torch.arange(times, device=device)).flatten()

    def of_batch(self, rows: Tensor, length: int) -> Tensor:
        """Which rows of the batch these are."""
        return rows // (length // len(self.names))

    def check(self, target: Target) -> None:
        """Raise ModelStateError where the adapter has a strength for each row of another batch."""
        if target.strength is not None and target.strength.dim() and len(target.strength) != len(self.names):
            raise ModelStateError(
                f"adapter '{target.adapter}' has a strength for each of {len(target.strength)} rows, and routed names "
                f"adapters for {len(self.names)}"
            )


def on_their_rows(state: LayerState, kind: str, layer: nn.Module, x: Tensor, y: Tensor | None) -> Tensor:
    """What the adapters of the layer make of x (`forward_input`), or of y with x (`forward`), each on its rows."""
    before = x if y is None else y
    on = [target for target in state.acting if getattr(target.variant, kind) is not None]
    if not on:
        return before
    for target in on:
        state.rows.check(target)
    groups = [(target, state.rows.of(target.adapter, len(before), target.name, before.device)) for target in on]
    if torch.compiler.is_compiling():
        return _masked(groups, kind, layer, x, y)
    alone = [group for group in groups if group[0].calls is not None]  # those see the whole batch
    before = _masked(alone, kind, layer, x, y)
    made: list[tuple[Tensor, Tensor]] = []
    for alike in _alike([group for group in groups if group[0].calls is None], layer):
        made += _together(state.rows, alike, kind, layer, x, before if y is not None else None)
    if not made:
        return before
    after = torch.cat([rows for _, rows in made]).to(before.dtype)
    return before.index_copy(0, torch.cat([numbers for numbers, _ in made]), after)


Group = tuple[Target, Tensor]


def _masked(groups: Sequence[Group], kind: str, layer: nn.Module, x: Tensor, y: Tensor | None) -> Tensor:
    """Every adapter on all rows, of which its own are kept: shapes that do not depend on whose they are."""
    before = x if y is None else y
    for target, rows in groups:
        hook = getattr(target.variant, kind)
        made = run(hook, kind, layer, target, before if y is None else x, None if y is None else before)
        mine = torch.zeros(len(before), dtype=torch.bool, device=before.device).index_fill(0, rows, True)
        before = torch.where(mine.view(-1, *(1,) * (before.dim() - 1)), made, before)
    return before


def _alike(groups: Sequence[Group], layer: nn.Module) -> list[list[Group]]:
    """Adapters of one variant, config and sizes beside each other."""
    found: list[tuple[Any, list[Group]]] = []
    for group in groups:
        target, params = group[0], group[0].params_on(layer)
        key = (
            target.variant,
            target.cfg,
            [(bare, tuple(t.shape), t.dtype) for bare, t in params.items()],
            target.ready,
        )
        alike = next((held for other, held in found if other == key), None)
        if alike is None:
            found.append((key, [group]))
        else:
            alike.append(group)
    return [held for _, held in found]


def _together(
    batch: BatchRows, groups: list[Group], kind: str, layer: nn.Module, x: Tensor, y: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """Rows and what becomes of them: in one batched call where there are many adapters and few rows of each."""
    hook: Hook = getattr(groups[0][0].variant, kind)
    count = sum(len(rows) for _, rows in groups)
    random = layer.training and torch.is_grad_enabled()  # dropout draws its masks row by row
    if len(groups) >= BATCHED_FROM and count <= 4 * len(groups) and not random and groups[0][0].ready:
        rows = torch.cat([numbers for _, numbers in groups])
        made = _batched(batch, groups, hook, layer, x, y, rows)
        if made is not None:
            return [(rows, made)]
    found: list[tuple[Tensor, Tensor]] = []
    for target, rows in groups:
        own = None if y is None else y[rows]
        found.append((rows, run(hook, kind, layer, target, x[rows], own, batch.of_batch(rows, len(x)))))
    return found


def _stacked(batch: BatchRows, groups: list[Group], layer: nn.Module) -> dict[str, Tensor]:
    """The groups' tensors by bare name, one beside the other: without gradients made once in a `routed` block, as long
    as nobody writes them."""
    each = [target.params_on(layer) for target, _ in groups]
    of = [tensor for params in each for tensor in params.values()]
    keep = not torch.is_grad_enabled() and not any(tensor.is_inference() for tensor in of)
    versions = [tensor._version for tensor in of] if keep else []
    key = (layer, *(target for target, _ in groups))
    held = batch.stacks.get(key) if keep else None
    if held is not None and held.versions == versions and all(map(operator.is_, held.of, of)):
        return held.params
    params = {bare: torch.stack([one[bare] for one in each]) for bare in each[0]}
    if keep:
        batch.stacks[key] = _Stack(of, versions, params)
    return params


def _batched(
    batch: BatchRows, groups: list[Group], hook: Hook, layer: nn.Module, x: Tensor, y: Tensor | None, rows: Tensor
) -> Tensor | None:
    """One call of the hook for all rows, each with the tensors of its adapter: `torch.func.vmap`, so that products
    become batched ones. None where the hook cannot be mapped: it looks at values, or writes in place."""
    first, sizes = groups[0][0], [len(numbers) for _, numbers in groups]
    params = _stacked(batch, groups, layer)
    if len(rows) > len(groups):
        which = torch.arange(len(groups)).repeat_interleave(torch.tensor(sizes)).to(x.device)
        params = {bare: tensor[which] for bare, tensor in params.items()}
    fixed = {"cfg": first.cfg, "layer": layer, "training": layer.training}

    def row(x: Tensor, y: Tensor | None, params: dict[str, Tensor]) -> Tensor:
        return hook({"x": x[None], "y": None if y is None else y[None], "params": params, **fixed})[0]

    own_x, own_y = x[rows], None if y is None else y[rows]
    try:
        made = torch.func.vmap(row, (0, None if y is None else 0, 0))(own_x, own_y, params)
    except RuntimeError:
        return None
    if all(target.strength is None for target, _ in groups):
        return made
    before, parts = own_x if own_y is None else own_y, list[Tensor]()
    for (target, numbers), after, own in zip(groups, made.split(sizes), before.split(sizes), strict=True):
        of = batch.of_batch(numbers, len(x))
        parts.append(after if target.strength is None else blended(own, after, target.strength, target, of))
    return torch.cat(parts)
