"""Promises about what belongs to whom: tensors of other layers, of other models, of the module."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ..files.load import load
from ..files.save import save
from .check import promise
from .variant_under_test import Net, Subject, close, hooks_by_hand, must, train


@promise(
    "declare it in param_specs and read it from `params`; what all layers use is one tensor: ParamSpec(…, shared='KEY')"
)
def check_reads_what_it_is_given(s: Subject) -> None:
    """forward and forward_input compute from their arguments, and from no tensor that the module keeps elsewhere."""
    for name, hook, given in hooks_by_hand(s):
        layer, params = given["layer"], given["params"]
        with (
            torch.no_grad(),
            _Seen((given["x"], given["y"], *params.values(), *layer.parameters(), *layer.buffers())) as seen,
        ):
            hook(given)
        must(not seen.strange, f"on {name} it reads {seen.strange}, which is none of its arguments")


class _Seen(TorchDispatchMode):
    """Notes the tensors that operations read and that were neither known before nor made inside."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.kept = list(known)  # or their addresses would be used again
        self.storages = {tensor.untyped_storage()._cdata for tensor in self.kept}
        self.strange = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [one for one in tree_leaves((args, kwargs or {})) if isinstance(one, Tensor)]
        made = func(*args, **(kwargs or {}))
        if "lift_fresh" not in str(func):  # torch.tensor(3.0)
            for one in inputs:
                if one.untyped_storage()._cdata not in self.storages:
                    self.strange = f"a tensor {tuple(one.shape)}"
        for one in tree_leaves(made):
            if isinstance(one, Tensor):
                self.kept.append(one)
                self.storages.add(one.untyped_storage()._cdata)
        return made


@promise("give what all layers have in common ParamSpec(…, shared='KEY'): one tensor, saved once")
def check_no_copies(s: Subject) -> None:
    """No two layers hold the same frozen numbers, and no tensor is registered twice."""
    model, adapter = s.trained()
    frozen = [(n, t.detach()) for n, t in adapter.named_tensors() if not t.requires_grad and t.numel() >= 16]
    frozen = [(n, t) for n, t in frozen if bool((t != t.flatten()[0]).any())]
    for at, (name, tensor) in enumerate(frozen):
        for other, twin in frozen[:at]:
            same = tensor.shape == twin.shape and torch.equal(tensor, twin)
            must(not same, f"{name} and {other} are copies of each other, {tuple(tensor.shape)} numbers a layer")
    held = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    must(len(held) == len(set(held)), "a parameter is registered on two layers")
    trained = [id(p) for p in adapter.parameters()]
    must(len(trained) == len(set(trained)), "adapter.parameters() gives a parameter twice")


@promise("keep nothing in the module between calls: another model's forward may come before this one's backward")
def check_two_models_side_by_side(s: Subject) -> None:
    """Two models with an adapter each, of which the second runs between the first one's forward and backward, under
    activation checkpointing, have the gradients that they have alone."""

    def gradients(beside: bool) -> list[Tensor]:
        first, second = s.model(), s.model(seed=1)
        one, other = s.attach(first, seed=3), s.attach(second, seed=4)
        for parameter in (*one.parameters(), *other.parameters()):
            parameter.data.add_(0.02)
        y = checkpoint(first, s.x().requires_grad_(), use_reentrant=False)
        if beside:
            checkpoint(second, s.x(seed=1).requires_grad_(), use_reentrant=False).square().mean().backward()
        y.square().mean().backward()
        return [parameter.grad for parameter in one.parameters() if parameter.grad is not None]

    for got, expected in zip(gradients(beside=True), gradients(beside=False), strict=True):
        close(got, expected, 1e-6, "a gradient beside another model")


@promise("save all that training changes: in tensors of param_specs, persistent ones")
def check_training_goes_on_after_reload(s: Subject) -> None:
    """Saved, loaded onto a fresh base and trained on, the adapter goes the way that it goes without (both with a new
    optimizer)."""
    model, adapter = s.trained()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        save(model, path)
        again: Net = s.model()
        loaded = load(again, path)
    ways = [train(s, one, of, steps=4) for one, of in ((model, adapter), (again, loaded))]
    for step, (kept, after) in enumerate(zip(*ways, strict=True)):
        must(abs(kept - after) <= 1e-4 * (1 + abs(kept)), f"the loss of step {step} is {after:.6f}, without {kept:.6f}")
