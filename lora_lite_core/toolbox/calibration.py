"""Calibration data for `group_init`: checked, run through the model, reduced to streaming statistics of the inputs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click
import torch
from torch import Tensor, nn

from ..attached.layer_hooks.expert_hooks import listen
from ..contract.errors import CalibrationError
from ..layers.kinds.convolution import rows_of
from ..layers.kinds.embedding import is_embedding
from ..layers.kinds.layer_kinds import input_name
from ..layers.twins import Twins

if TYPE_CHECKING:
    from ..contract.target import Target

EIGH_LIMIT = 4096  # largest covariance that is solved in full
ROUNDING = 1e-6  # of float32 sums: what varies less, as a share of the square, is not seen
STRIP = 128  # rows of a Gram matrix that are summed at once, from the diagonal on: it is symmetric


def calibration_batches(data: Iterable[Any] | None, variant: str) -> Iterable[Any]:
    """The data as something that can be read again and again, at least one batch long.

    Raises CalibrationError when there is none, when it is one batch and not several, or an iterator that is used up
    after one pass.
    """
    if data is None:
        raise CalibrationError(f"variant '{variant}' needs calibration data; give attach(…, calibration_data=batches)")
    if isinstance(data, Iterator):
        raise CalibrationError(
            f"variant '{variant}' reads its calibration data more than once, and this {type(data).__name__} is used up "
            "after one pass; give a list or a DataLoader"
        )
    several = any(hasattr(type(data), name) for name in ("__iter__", "__getitem__"))
    if isinstance(data, (str, Tensor, Mapping)) or not several:
        raise CalibrationError(
            f"variant '{variant}' got a {type(data).__name__} as calibration data; give a list of batches: [batch, …]"
        )
    if next(iter(data), None) is None:
        raise CalibrationError(f"variant '{variant}' got calibration data without a single batch")
    return data


@torch.no_grad()
def run_batch(model: nn.Module, batch: Any) -> None:
    """One forward pass on a batch: a dict is keyword arguments, a tuple or list positional ones, else one argument."""
    output_of(model, batch)


def output_of(model: nn.Module, batch: Any) -> Any:
    """The same, with gradients where they are on, and what the model returns."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


class Accumulator:
    """A statistic of a layer's inputs that grows row by row; `add` gets (tokens, d_in) in float32 or better. `name` is
    that of the layer, or of the first of those that share it."""

    name = "a layer"

    def __init__(self) -> None:
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """Take in rows (tokens, d_in), and count them."""
        raise NotImplementedError


class Moments(Accumulator):
    """Sum and Gram matrix of all rows, float32 (float64 for float64 rows) on their device, whatever their number."""

    def __init__(self, d_in: int) -> None:
        super().__init__()
        self.d_in = d_in
        self._sum: Tensor | None = None
        self._gram: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Take in rows (tokens, d_in), and count them."""
        if self._sum is None or self._gram is None:
            self._sum, self._gram = rows.new_zeros(self.d_in), rows.new_zeros(self.d_in, self.d_in)
        self.count += len(rows)
        self._sum += rows.sum(0)
        for start in range(0, self.d_in, STRIP):
            strip = slice(start, start + STRIP)
            self._gram[strip, start:].addmm_(rows[:, strip].T, rows[:, start:])

    def second_moment(self, *, center: bool) -> Tensor:
        """E[x xᵀ], or the covariance: (d_in, d_in) float64 on the CPU. Raises CalibrationError when no row came, and
        when it would be nothing but zero, rounding or infinity."""
        if self._sum is None or self._gram is None or not self.count:
            raise CalibrationError(f"no row of calibration data reached {self.name}")
        upper, mean = self._gram.double().cpu().triu() / self.count, self._sum.double().cpu() / self.count
        gram = upper + upper.triu(1).T
        size, spread = gram.trace(), gram.trace() - mean.square().sum()
        if not size.isfinite():
            raise CalibrationError(f"{self.name}: inputs in the calibration data are too large to be squared")
        if not size > 0:
            raise CalibrationError(
                f"{self.name}: all inputs in the calibration data are zero; give batches that the layer does see"
            )
        if center and not spread > ROUNDING * size:
            raise CalibrationError(f"{self.name}: all inputs in the calibration data are the same; give other batches")
        return gram - torch.outer(mean, mean) if center else gram


Kind = TypeVar("Kind", bound=Accumulator)


def collect_inputs(
    model: nn.Module, targets: Sequence[Target], batches: Iterable[Any], make: Callable[[Target], Kind], *, shared: bool
) -> dict[str, Kind]:
    """One pass over the batches: for each target an accumulator of what its layer receives, padding left out.

    With `shared`, layers that receive the same live tensor object in one forward get one accumulator between them. Rows
    that a batch's `attention_mask` marks with 0 are left out. A twin of the model runs, in eval mode under no_grad,
    with a progress bar on a terminal. Raises CalibrationError for a layer that no batch reached, or that left its
    group, ModelStateError for a model whose class forbids copies.
    """
    if lookups := [target.name for target in targets if is_embedding(target.layer)]:
        raise CalibrationError(f"{lookups[0]} is an embedding, whose inputs are token ids and have no statistics")
    collector = _Collector(make, shared)
    twins = Twins()
    twin = twins.of(model)
    for target in targets:
        if target.stack is None:
            twins.of(target.layer).register_forward_pre_hook(collector.hook_for(target), with_kwargs=True)
    listen_to_experts(targets, twins, collector.visit_rows)
    hidden = not sys.stderr.isatty()
    with click.progressbar(batches, label="calibrating", file=sys.stderr, hidden=hidden) as bar:
        for batch in bar:
            collector.mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            run_batch(twin, batch)
            collector.seen.clear()  # its tensors die now, and their addresses may be used again
    if missed := [target.name for target in targets if target.name not in collector.leader]:
        raise CalibrationError(f"no batch of the calibration data reached {missed[0]} ({len(missed)} layers in all)")
    return {target.name: collector.found[collector.leader[target.name]] for target in targets}


class _Collector:
    """`leader` maps each layer to the layer whose accumulator it uses; `seen` holds this forward's tensors alive."""

    def __init__(self, make: Callable[[Target], Any], shared: bool) -> None:
        self.make, self.shared = make, shared
        self.mask: Tensor | None = None
        self.seen: list[tuple[Tensor, str]] = []
        self.leader: dict[str, str] = {}
        self.found: dict[str, Any] = {}

    def hook_for(self, target: Target) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.visit(target, args[0] if args else kwargs[input_name(layer)])

        return hook

    def visit(self, target: Target, x: Tensor) -> None:
        twin = next((name for tensor, name in self.seen if tensor is x), None) if self.shared else None
        leader = self.leader.setdefault(target.name, twin or target.name)
        if leader != target.name:
            if twin != leader:
                raise CalibrationError(
                    f"{target.name} got the input of {leader} in one batch and another one in the next"
                )
            return
        self.seen.append((x, target.name))
        rows = rows_of(target.layer, x.detach())
        rows = rows.flatten(0, -2) if rows.dim() > 1 else rows[None]
        if self.mask is not None and self.mask.numel() == len(rows):
            rows = rows[self.mask.to(rows.device).flatten().bool()]
        self.add(target, rows)

    def visit_rows(self, target: Target, rows: Tensor, y: Tensor) -> Tensor:
        """Of an expert, which gets other rows than any other layer, and no padding that could be told."""
        self.leader[target.name] = target.name
        self.add(target, rows.detach())
        return y

    def add(self, target: Target, rows: Tensor) -> None:
        if not rows.isfinite().all():
            raise CalibrationError(f"{target.name} gets inputs with nan or inf from the calibration data")
        if target.name not in self.found:
            self.found[target.name] = self.make(target)
            self.found[target.name].name = target.name
        self.found[target.name].add(rows.to(torch.promote_types(rows.dtype, torch.float32)))


def listen_to_experts(
    targets: Sequence[Target], twins: Twins, call: Callable[[Target, Tensor, Tensor], Tensor]
) -> None:
    """Have `call` see the rows and outputs of those targets that are one expert, on the twins of their modules."""
    stacks: dict[int, dict[int, Target]] = {}
    for target in targets:
        if target.stack is not None:
            stacks.setdefault(id(target.stack), {})[target.number] = target
    for members in stacks.values():
        stack = next(iter(members.values())).stack
        assert stack is not None

        def heard(index: Any, x: Tensor, y: Tensor | None, members: dict[int, Target] = members) -> Tensor:
            assert y is not None
            return call(members[int(index)], x, y) if int(index) in members else y

        listen(twins.of(stack.layer), stack.part, heard)


def principal_directions(moment: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The share of the trace (count,) that each top eigenvector of a covariance (d, d) explains, and they as rows.

    Float64. In full up to d = 4096, else by subspace iteration from a seeded start. Signs: largest entry positive.
    """
    d = len(moment)
    if d <= EIGH_LIMIT:
        values, vectors = torch.linalg.eigh(moment)
    else:
        start = torch.randn(d, min(count + 32, d), generator=torch.Generator().manual_seed(0), dtype=moment.dtype)
        basis = torch.linalg.qr(start).Q
        for _ in range(10):
            basis = torch.linalg.qr(moment @ basis).Q
        values, inner = torch.linalg.eigh(basis.T @ moment @ basis)
        vectors = basis @ inner
    values, rows = values[-count:].flip(0).clamp_min(0), vectors[:, -count:].flip(1).T
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return values / moment.trace().clamp_min(torch.finfo(moment.dtype).tiny), rows * torch.where(largest < 0, -1.0, 1.0)
