"""Promises about what is beside an adapter: other layers, other models, other adapters, other rows of a batch."""

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

from ..attached.adapter import adapters
from ..attached.switching.choosing import active, routed, strength
from ..contract.errors import LoraLiteError, MergeError, UnknownVariant
from ..files.load import load
from ..files.peft.combining import combine
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


def _two(s: Subject, **changes: object) -> Net:
    """A model in float64 with two adapters of the variant, "one" and "two", that do different things."""
    model = s.model(torch.float64).eval()
    for number, name in enumerate(("one", "two")):
        draws = torch.Generator().manual_seed(7 + number)
        for parameter in s.attach(model, name, seed=number, **changes).parameters():
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=draws, dtype=torch.float64).to(parameter))
    return model


@promise("return a new tensor computed from x, y and `params`: y + s · (y' − y) is formed of what is returned")
def check_strength(s: Subject) -> None:
    """At strength 0 the model is the base and at 1 the adapted model, bit for bit; between them y + s · (y' − y) of the
    output's side and x + s · (x' − x) of the input's."""
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = s.trained(dtype)
        model.eval()
        x = s.x(dtype=dtype)
        with torch.no_grad():
            base, adapted = s.model(dtype).eval()(x), model(x)
            with strength(model, {"default": 0.0}):
                close(model(x), base, 0, f"the output at strength 0 in {dtype}")
            with strength(model, {"default": torch.ones(len(x))}):
                close(model(x), adapted, 0, f"the output at strength 1 in {dtype}")
    if s.variant.asks("context"):
        return  # a layer alone has no call of the model's that it could be told of
    for name, _, given in hooks_by_hand(s):
        _one_layer(s, name, given)


def _one_layer(s: Subject, name: str, given: dict[str, object]) -> None:
    """A layer at strength −0.5 against its hooks called by hand."""
    model, adapter = s.trained()
    model.eval()
    layer, target, x = model.get_submodule(name), adapter.layers()[name], given["x"]
    assert isinstance(x, Tensor)
    own = {**given, "layer": layer, "params": target.params_on(layer)}
    with torch.no_grad():
        moved, change_x, change_y = x, target.variant.forward_input, target.variant.forward
        if change_x is not None:
            moved = x - 0.5 * (change_x({**own, "x": x}) - x)
        with active(model):
            expected = layer(moved)
        if change_y is not None:
            expected = expected - 0.5 * (change_y({**own, "x": moved, "y": expected}) - expected)
        with strength(model, {"default": -0.5}):
            close(layer(x), expected, 1e-5, f"{name} at strength -0.5")


@promise("compute each row from that row and the parameters, whatever the batch, and only from `params`")
def check_routed(s: Subject) -> None:
    """In a batch whose rows belong to different adapters each row gets what it gets alone, gradients too."""
    model = _two(s)
    names = ["one", None, "two", "one"]
    x = s.x(len(names), 5, dtype=torch.float64)
    rows: list[Tensor] = []
    for row, name in enumerate(names):
        with active(model, *([name] if name else [])):
            rows.append(model(x[row : row + 1]))
    alone = torch.cat(rows)
    trained = [parameter for adapter in adapters(model).values() for parameter in adapter.parameters()]
    expected = torch.autograd.grad(alone.square().sum(), trained, materialize_grads=True)
    with routed(model, names):
        together = model(x)
    close(together.detach(), alone.detach(), 1e-9, "the rows of a mixed batch")
    got = torch.autograd.grad(together.square().sum(), trained, materialize_grads=True)
    for mine, its in zip(got, expected, strict=True):
        close(mine, its, 1e-8, "a gradient of a mixed batch")


@promise("leave merging to the core, or declare AFFINE = False: what is added to W x must be a fixed matrix times x")
def check_combined(s: Subject) -> None:
    """combine(model, {"one": 0.7, "two": -0.3}) makes a LoRA that changes a layer by that sum of the two changes; what
    has no such sum is refused with a MergeError."""
    model = _two(s, target_names=("^down$",))  # a layer without a bias, which a LoRA could not change
    x = torch.randn(6, s.sizes[0 if s.of_blocks else 1], generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        with active(model):
            base = model(x, only="down")
        expected = base
        for name, weight in {"one": 0.7, "two": -0.3}.items():
            with active(model, name):
                expected = expected + weight * (model(x, only="down") - base)
        before = list(adapters(model))
        try:
            combine(model, {"one": 0.7, "two": -0.3}, name="sum")
        except UnknownVariant:
            return  # no package with `lora` is installed
        except MergeError:
            must(list(adapters(model)) == before, "a refused combination leaves an adapter behind")
            return
        except LoraLiteError as error:
            must(False, f"{type(error).__name__}: {error}")
        with active(model, "sum"):
            close(model(x, only="down"), expected, 1e-4, "the layer under the combination")
