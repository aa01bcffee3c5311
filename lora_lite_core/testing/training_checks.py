"""Promises about training."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradcheck
from torch.utils.checkpoint import checkpoint

from ..attached.adapter import detach
from .check import promise
from .variant_under_test import Subject, close, must, train, weights_hash


@promise(
    "read the weight with dense_weight(layer), keep what you need in tensors of param_specs, and write to those only"
)
def check_base_is_never_written(s: Subject) -> None:
    """The base's tensors, attributes and forward are the same before attach, after training, and after detach."""

    model = s.model()
    weights, keys = weights_hash(model), list(model.state_dict())
    attributes = {name: set(vars(layer)) for name, layer in model.named_modules()}

    def unchanged(when: str) -> None:
        must(weights_hash(model) == weights, f"a weight of the base has changed {when}")
        for name, layer in model.named_modules():
            added = [key for key in vars(layer) if key not in attributes[name] and not key.startswith("_lora_lite")]
            must(not added, f"{name or 'the model'} has new attributes {added} {when}")

    adapter = s.attach(model)
    unchanged("after attach")
    train(s, model, adapter, steps=2)
    unchanged("after training")
    detach(model)
    unchanged("after detach")
    must(list(model.state_dict()) == keys, "the state dict has other keys after detach")
    must(all(p.requires_grad for p in model.parameters()), "a parameter of the base stays frozen after detach")


@promise("give every trainable tensor a path to the output, and start at most one factor of a product at zero")
def check_every_trainable_tensor_moves(s: Subject) -> None:
    """Each layer has a gradient at step 0, every trainable tensor has moved after a few steps, and no other has, unless
    in before_step."""
    model = s.model()
    adapter = s.attach(model)
    before = {name: tensor.detach().clone() for name, tensor in adapter.named_tensors()}
    model(s.x()).square().mean().backward()
    grads = {name: [t.grad for t in target.params.values()] for name, target in adapter.layers().items()}
    alive = [name for name, of_layer in grads.items() if any(g is not None and bool(g.any()) for g in of_layer)]
    must(len(alive) == len(grads), f"only {sorted(alive)} of {adapter.targets} have a gradient at step 0")
    model.zero_grad()
    train(s, model, adapter, steps=4)
    for name, tensor in adapter.named_tensors():
        moved = not torch.equal(tensor.detach(), before[name])
        may_move = s.variant.before_step is not None and not tensor.requires_grad
        must(may_move or moved == tensor.requires_grad, f"{name} has {'moved' if moved else 'not moved'}")


@promise("check the sign and size of the change; a method that trains only at some learning rates says so in its text")
def check_loss_falls(s: Subject) -> None:
    """Forty AdamW steps at 1e-2 lower the loss of a small regression, and it stays finite."""
    model = s.model()
    losses = train(s, model, s.attach(model), steps=40)
    must(all(map(math.isfinite, losses)), f"losses {losses[:3]} … {losses[-3:]}")
    must(losses[-1] < 0.999 * losses[0], f"from {losses[0]:.4f} to {losses[-1]:.4f}")


@promise(
    "use differentiable operations on params (.data, .detach() and no_grad cut gradients off), and for small solves "
    "torch.promote_types(x.dtype, torch.float32), not .float()"
)
def check_gradients(s: Subject) -> None:
    """In float64 the gradients of x and of every parameter are those that finite differences give."""
    model, adapter = s.trained(torch.float64)
    for number, tensor in enumerate(adapter.parameters()):
        draw = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        tensor.data.add_(draw, alpha=0.3)
    here = {id(t) for t in adapter.layers()["mix"].params.values()}
    named = {name: t for name, t in adapter.named_tensors() if t.requires_grad and id(t) in here}
    x = s.x(3, dtype=torch.float64).requires_grad_()

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(named, values, strict=True)), (x,), {"only": "mix"})

    values = [tensor.detach().clone().requires_grad_() for tensor in named.values()]
    try:
        gradcheck(run, (x, *values), fast_mode=True)
    except GradcheckError as error:
        must(False, " ".join(str(error).split()).partition(" The above")[0])


@promise("make forward a function of its arguments alone, without state between calls")
def check_checkpointing(s: Subject) -> None:
    """Activation checkpointing, which runs forward a second time in backward, gives the same gradients."""
    model, adapter = s.trained()
    tensors = list(adapter.parameters())
    gradients = []
    for how in ("plain", "reentrant", "not reentrant"):
        x = s.x().requires_grad_()
        y = model(x) if how == "plain" else checkpoint(model, x, use_reentrant=how == "reentrant")
        y.square().mean().backward()
        gradients.append([t.grad for t in (x, *tensors) if t.grad is not None])
        model.zero_grad()
    for how, found in zip(("reentrant", "not reentrant"), gradients[1:], strict=True):
        must(len(found) == len(gradients[0]), f"a parameter has no gradient under {how} checkpointing")
        for got, expected in zip(found, gradients[0], strict=True):
            close(got, expected, 1e-6, f"a gradient under {how} checkpointing")
