"""Gradients of the loss with respect to frozen weights, for methods that start from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..contract.errors import CalibrationError
from ..layers.kinds.convolution import channels_last, is_convolution, rows_of
from ..layers.kinds.embedding import is_embedding
from ..layers.kinds.layer_kinds import input_name
from ..layers.twins import Twins
from .calibration import listen_to_experts, output_of

if TYPE_CHECKING:
    from ..contract.target import Target

LossOf = Callable[[Any, Any], Tensor]  # of the model's output and the batch


def collect_gradients(
    model: nn.Module, targets: Sequence[Target], batches: Iterable[Any], *, loss: LossOf | None = None
) -> dict[str, Tensor]:
    """∂ loss / ∂ W of each target's dense weight, (d_out, d_in) in float32 (float64 on float64 layers), the mean over
    the batches; to be called in `group_init`.

    loss  of a batch, made of the model's output and the batch; None takes `output.loss`, `output["loss"]`, or an output
          that is a scalar itself (batches hold the labels then)

    Works on frozen, quantised and shared bases alike: the gradient is gathered as Σ ∂y xᵀ from what goes through each
    layer, and never held for the whole model in another form. A twin of the model runs, in eval mode; the model is not
    touched. Raises CalibrationError when there is no batch, no loss, or when one does not reach a layer, or not as a
    finite number.
    """
    twins = Twins()
    twin = twins.of(model)
    twin.requires_grad_(False)  # of the twin's own parameters
    found: dict[str, Tensor] = {}
    for target in targets:
        if target.stack is None:
            twins.of(target.layer).register_forward_hook(_collector(target, found), with_kwargs=True)
    listen_to_experts(targets, twins, lambda target, x, y: _follow(target, found, x.detach(), y))
    count = 0
    for batch in batches:
        count += 1
        with torch.enable_grad(), twins.kept_apart():
            value = _loss(output_of(twin, batch), batch, loss)
            if not value.requires_grad:
                raise CalibrationError(
                    "the loss does not depend on any target; collect_gradients has nothing to follow"
                )
            value.backward()
    if not count:
        raise CalibrationError("collect_gradients got no batch; give attach(…, calibration_data=batches)")
    if missed := [target.name for target in targets if target.name not in found]:
        raise CalibrationError(f"no gradient of the loss reached {missed[0]} ({len(missed)} layers in all)")
    if wrong := [name for name, gradient in found.items() if not gradient.isfinite().all()]:
        raise CalibrationError(f"the gradient of the loss at {wrong[0]} has nan or inf ({len(wrong)} layers in all)")
    return {name: gradient / count for name, gradient in found.items()}


def _collector(target: Target, found: dict[str, Tensor]) -> Callable[..., Tensor | None]:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        x: Tensor = (args[0] if args else kwargs[input_name(layer)]).detach()
        return _follow(target, found, x, y)

    return hook


def _follow(target: Target, found: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """y, whose gradient will be gathered on the way back."""

    def add(x: Tensor, gradient: Tensor) -> None:
        if is_convolution(target.layer):
            gradient = channels_last(target.layer, gradient)
        full = torch.promote_types(gradient.dtype, torch.float32)
        errors = gradient.detach().reshape(-1, target.d_out).to(full)
        if is_embedding(target.layer):
            product = errors.new_zeros(target.d_in, target.d_out).index_add_(0, x.reshape(-1), errors).T
        else:
            product = errors.T @ rows_of(target.layer, x).reshape(-1, target.d_in).to(full)
        found[target.name] = found[target.name] + product if target.name in found else product

    if not y.requires_grad:  # nothing before it is trained: the way back starts here
        y = y.detach().requires_grad_()
    y.register_hook(lambda gradient: add(x, gradient))
    return y


def _loss(output: Any, batch: Any, loss: LossOf | None) -> Tensor:
    if loss is not None:
        value: Any = loss(output, batch)
    elif isinstance(output, Mapping):
        value = output.get("loss")
    else:
        value = getattr(output, "loss", output)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise CalibrationError(
            f"the model's {type(output).__name__} holds no loss: give batches with labels (calibration_data=…, as for "
            "training), or a function: collect_gradients(…, loss=lambda output, batch: …)"
        )
    return value.reshape(())
