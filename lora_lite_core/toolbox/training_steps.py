"""What an adapter does beside forward while it is trained: work before every optimizer step, and terms of the loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..attached.records import Record, names_of, record_of, records_of, targets_of
from ..attached.switching.activity import acting_on
from ..attached.targets.experts import single
from ..attached.tensors.made import as_made, check_in_place
from ..contract.errors import BrokenPlugin, ModelStateError
from ..contract.target import Params, Target
from ..layers.kinds.layer_kinds import is_sharded
from ..layers.shards import copy_shard


def follow(model: nn.Module, optimizer: Any) -> RemovableHandle:
    """Let the adapters on the model act before every step of this optimizer (the variant's `before_step`: schedules,
    masks, gradients that are rewritten), and count its steps. A handle, whose `remove()` ends it.

    Needed for variants that have a `before_step`, harmless for others: call it once, after the optimizer is made. The
    count is saved with the adapter and goes on after `load`. An optimizer that wraps another (accelerate's) is followed
    inside. A second call for an adapter takes the place of the first. With torch's GradScaler and a fused optimizer,
    call `scaler.unscale_(optimizer)` before the step. Raises ModelStateError for an optimizer that trains none of them.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    acting = {name: record for name, record in records_of(model).adapters.items() if record.variant.before_step}
    followed = [name for name in acting if trained & {id(p) for p in _parameters(model, name)}]
    if acting and not followed:
        raise ModelStateError(
            f"the {type(optimizer).__name__} has no parameter of adapter '{next(iter(acting))}'; make it of "
            "adapter.parameters() or ll.param_groups(model), after attach"
        )
    step = _BeforeStep(model, followed)
    for name in followed:
        acting[name].follower = step
    handle: RemovableHandle = optimizer.register_step_pre_hook(step)
    return handle


class _BeforeStep:
    """The optimizer's hook."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.model, self.names = model, tuple(names)

    def __call__(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if getattr(optimizer, "grad_scale", None) is not None:
            raise ModelStateError(
                "the gradients are still scaled by the GradScaler; call scaler.unscale_(optimizer) before scaler.step"
            )
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None and bool(overflow):
            return  # the optimizer skips this step
        for name in self.names:
            record = records_of(self.model).adapters.get(name)
            if record is not None and record.follower is self and name in acting_on(self.model).names:
                _act(self.model, name, record)
                record.step += 1


@torch.no_grad()
def _act(model: nn.Module, name: str, record: Record) -> None:
    assert record.variant.before_step is not None
    whole = _Whole()
    targets = tuple(one for target in targets_of(model, name).values() for one in whole.targets(target))
    made = [(target, as_made(target.params)) for target in targets]
    label = f"before_step of variant '{record.variant.name}'"
    if record.variant.before_step({"targets": targets, "cfg": record.cfg, "step": record.step}) is not None:
        raise BrokenPlugin(f"{label} returned something; it changes tensors and their .grad in place and returns None")
    for target, tensors in made:
        check_in_place(f"{label}, on {target.name},", target.params, tensors)
    whole.write_back()


class _Whole:
    """Sharded tensors (FSDP2) as whole ones with whole gradients, the same one for layers that share it."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Any, Tensor]] = {}

    def targets(self, target: Target) -> list[Target]:
        """The target with whole tensors, or each of its experts with slices of them and of their gradients."""
        params = {bare: self._whole(tensor) for bare, tensor in target.params.items()}
        if not target.experts:
            return [replace(target, seen=Params(params))]
        found = single(target, {bare: tensor.detach() for bare, tensor in params.items()})
        for index, one in enumerate(found):
            for bare, tensor in one.params.items():
                if (gradient := params[bare].grad) is not None:
                    tensor.grad = gradient if bare in target.shared else gradient[index]
        return found

    def _whole(self, tensor: Any) -> Tensor:
        if not is_sharded(tensor):
            return tensor
        if id(tensor) not in self._made:
            whole = tensor.full_tensor().detach().clone()
            whole.grad = None if tensor.grad is None else tensor.grad.full_tensor().clone()
            self._made[id(tensor)] = tensor, whole
        return self._made[id(tensor)][1]

    def write_back(self) -> None:
        for tensor, whole in self._made.values():
            copy_shard(tensor, whole)
            if whole.grad is not None and tensor.grad is not None:
                copy_shard(tensor.grad, whole.grad)


def penalty(model: nn.Module, name: str | None = None) -> Tensor:
    """What the adapters on the model (or one of them) add to the loss, a scalar: the sum of the variant's `penalty`
    over its layers, zero where none has one. Its weight is a field of the config.

        loss = task_loss + ll.penalty(model)

    Adapters that are not active add nothing. Raises AdapterNameError.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    total = torch.zeros((), device=device)
    acting = acting_on(model).names
    for one in names_of(model, name):
        record = record_of(model, one)
        if record.variant.penalty is None or one not in acting:
            continue
        for target in targets_of(model, one).values():
            params = {
                bare: tensor.full_tensor() if is_sharded(tensor) else tensor
                for bare, tensor in target.params_on(target.layer).items()
            }
            for single_one in single(target, params):
                total = total + _term(record, single_one).to(device)
    return total


def _term(record: Record, target: Target) -> Tensor:
    assert record.variant.penalty is not None
    term: object = record.variant.penalty({"params": target.params, "cfg": target.cfg})
    if not isinstance(term, Tensor) or term.dim():
        what = f"a tensor {tuple(term.shape)}" if isinstance(term, Tensor) else type(term).__name__
        raise BrokenPlugin(f"penalty of variant '{record.variant.name}' returned {what}; return a scalar tensor")
    return term


def _parameters(model: nn.Module, name: str) -> Iterable[nn.Parameter]:
    for target in targets_of(model, name).values():
        yield from (t for t in target.params.values() if isinstance(t, nn.Parameter) and t.requires_grad)
