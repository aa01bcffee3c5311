"""Promises about the forward pass."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..toolbox.training_steps import penalty
from .check import promise
from .variant_under_test import Subject, close, hooks_by_hand, must


@promise("work on the last dimension only (F.linear, x @ A.T, x * g); do not unpack or assume x.shape")
def check_any_leading_shape(s: Subject) -> None:
    """Inputs may have any leading shape, be empty, or not be contiguous, and each row gets the same result."""
    model, _ = s.trained()
    with torch.no_grad():
        x = s.x(4, 6)
        expected = model(x)
        close(model(x.reshape(2, 2, 6, -1)).reshape(expected.shape), expected, 1e-5, "four dimensions")
        close(model(x.reshape(24, -1)).reshape(expected.shape), expected, 1e-5, "two dimensions")
        close(model(x[0, 0]), expected[0, 0], 1e-5, "one dimension")
        must(model(x[:0]).shape == (0, *expected.shape[1:]), "an empty batch does not give an empty output")
        close(model(x.transpose(0, 1)).transpose(0, 1), expected, 1e-5, "a transposed, non-contiguous input")


@promise("compute each row from that row and the parameters: no mean over the batch, no choice by a value of x")
def check_rows_are_independent(s: Subject) -> None:
    """What a token gets does not depend on the tokens beside it."""
    model, _ = s.trained()
    with torch.no_grad():
        x, other = s.x(3, 5), 30 * s.x(3, 5, seed=1) + 10
        close(model(torch.cat([x, other]))[:3], model(x), 1e-4, "rows beside larger ones")
        alone = torch.cat([model(row[None]) for row in x])
        close(alone, model(x), 1e-5, "rows one at a time")


@promise("draw only `if training` (an argument of forward and forward_input), and count nothing in forward")
def check_forward_is_repeatable(s: Subject) -> None:
    """The same input gives the same output twice, also in train mode unless the variant asks for `training`, and
    forward writes no adapter tensor."""
    model, adapter = s.trained()
    tensors = {name: t.detach().clone() for name, t in adapter.named_tensors()}
    with torch.no_grad():
        first = model.eval()(s.x())
        close(model(s.x()), first, 0, "a second forward")
        if not s.asks_for_training:
            close(model.train()(s.x()), first, 0, "train mode")
        model.train()(s.x())
    for name, tensor in adapter.named_tensors():
        close(tensor.detach(), tensors[name], 0, f"{name} after forward")


@promise("draw from torch's global generator alone (torch.randn_like, F.dropout), and keep shape and dtype")
def check_training_mode(s: Subject) -> None:
    """In train mode the output has the shape and dtype of eval mode's, every trainable tensor has a finite gradient,
    and a seed of torch's global generator repeats both, under activation checkpointing, too."""
    model, adapter = s.trained()
    tensors, found = list(adapter.parameters()), []
    expected = model.eval()(s.x())
    model.train()
    for again in (False, True):
        torch.manual_seed(4)
        x = s.x().requires_grad_()
        y = checkpoint(model, x, use_reentrant=False) if again else model(x)
        must((y.shape, y.dtype) == (expected.shape, expected.dtype), f"{y.dtype} {tuple(y.shape)} in train mode")
        y.square().mean().backward()
        must(all(t.grad is not None and bool(t.grad.isfinite().all()) for t in tensors), "a gradient is not finite")
        found.append([y.detach(), *(t.grad for t in tensors)])
        model.zero_grad()
    for first, second in zip(*found, strict=True):
        close(second, first, 1e-6, "the output or a gradient with the same seed")
    low = s.model(torch.bfloat16).train()
    s.attach(low)
    must(low(s.x(dtype=torch.bfloat16)).dtype == torch.bfloat16, "in bfloat16 and train mode the output is not")


@promise("do not write into x or y (no x += …, no y.mul_()): return a new tensor")
def check_inputs_are_not_written(s: Subject) -> None:
    """forward and forward_input leave the tensors they are given as they were."""
    for name, hook, given in hooks_by_hand(s):
        kept = {key: given[key].clone() for key in ("x", "y")}
        with torch.no_grad():
            hook(given)
        for key, side in (("x", "input"), ("y", "output")):
            close(given[key], kept[key], 0, f"the {side} of {name} after the hook")


@promise("end with .to(y.dtype), and cast parameters to x.dtype for large products")
def check_low_precision(s: Subject) -> None:
    """In bfloat16, float16 and under autocast the output has the frozen layer's dtype and is near float32's."""
    model, adapter = s.trained()
    reference = model(s.x()).detach()
    values = {name: tensor.detach().clone() for name, tensor in adapter.named_tensors()}
    for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
        low = s.model(dtype)
        for name, tensor in s.attach(low).named_tensors():
            tensor.data.copy_(values[name])
        with torch.no_grad():
            got = low(s.x(dtype=dtype))
        must(got.dtype == dtype, f"{got.dtype} from a {dtype} model")
        close(got.float(), reference, tolerance, f"the output in {dtype}")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = s.x()
        expected = s.model()(x, only="up").dtype
        got = model(x, only="up").dtype
        must(got == expected, f"{got} under autocast, where the layer gives {expected}")
        (model(x).float().square().mean() + penalty(model)).backward()
    must(all(p.grad is not None for p in adapter.parameters()), "a parameter has no gradient under autocast")


@promise("read tensors from `params` at every call; keep none in a closure, a global, or on the layer")
def check_parameters_are_read_at_each_call(s: Subject) -> None:
    """When other tensors are put in the parameters' place, as sharding does, the next forward uses them."""
    model, adapter = s.trained()
    with torch.no_grad():
        adapted = model(s.x())
        swapped, expected = s.model(), s.model()
        for one in (swapped, expected):
            s.attach(one)
        swapped(s.x())
        for name, tensor in adapter.named_tensors():
            layer_name, _, bare = name.rpartition(".")
            layer = swapped.get_submodule(layer_name)
            if isinstance(tensor, nn.Parameter):
                setattr(layer, bare, nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad))
            else:
                setattr(layer, bare, tensor.detach().clone())
        close(swapped(s.x()), adapted, 1e-6, "the output after a swap")


@promise(
    "use tensor operations only: no .item(), no `if` on values, no Python objects made per call that torch cannot trace"
)
def check_compiles_without_a_break(s: Subject) -> None:
    """torch.compile(fullgraph=True) traces the adapted model, and it computes the same."""
    model, _ = s.trained()
    expected = model(s.x()).detach()
    torch.compiler.reset()
    try:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        close(compiled(s.x()).detach(), expected, 1e-5, "the compiled output")
    finally:
        torch.compiler.reset()


@promise(
    "take what is random out of forward first; for a nonlinearity declare AFFINE = False in the module, or take it "
    "out: merging and exporting need affine variants"
)
def check_affine_as_declared(s: Subject) -> None:
    """f(a) + f(b) − f(0) = f(a + b) on one layer, unless AFFINE = False says that it is not so."""
    model, _ = s.trained(torch.float64)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return model(x, only="mix")  # type: ignore[no-any-return]

    worst = 0.0
    with torch.no_grad():
        x = s.x(8, dtype=torch.float64)
        must(
            torch.equal(layer(x), layer(x)), "two calls on the same rows differ, so that it is not one function of them"
        )
        for size in (1e-2, 1.0, 1e2):
            a, b = (size * s.x(8, dtype=torch.float64, seed=seed) for seed in (1, 2))
            parts = [layer(a), layer(b), layer(torch.zeros_like(a)), layer(a + b)]
            rest = parts[0] + parts[1] - parts[2] - parts[3]
            worst = max(worst, float(rest.norm() / sum(part.norm() for part in parts)))
    if s.variant.affine:
        must(worst < 1e-10, f"relative deviation {worst:.1e} from affine")
    else:
        must(worst > 1e-10, "it is affine, so that AFFINE = False only keeps it from being merged")
