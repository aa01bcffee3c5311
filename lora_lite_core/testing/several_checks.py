"""Promises about adapters that are chosen, blended, given to rows of a batch, and combined."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attached.adapter import adapters
from ..attached.switching.choosing import active, routed, strength
from ..contract.errors import LoraLiteError, MergeError, MissingPlugin
from ..files.peft.combining import combine
from .check import promise
from .variant_under_test import Net, Subject, close, hooks_by_hand, must


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
        except MissingPlugin:
            return  # the package of `lora` is not installed
        except MergeError:
            must(list(adapters(model)) == before, "a refused combination leaves an adapter behind")
            return
        except LoraLiteError as error:
            must(False, f"{type(error).__name__}: {error}")
        with active(model, "sum"):
            close(model(x, only="down"), expected, 1e-4, "the layer under the combination")
