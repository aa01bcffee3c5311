"""The loss's gradient at each frozen weight before training, for the variants of this package that start from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lora_lite_core import CalibrationError, Target, calibration_batches, collect_gradients


def first_gradients(
    model: nn.Module, targets: tuple[Target, ...], calibration_data: Any, variant: str
) -> dict[str, Tensor]:
    """∂ loss / ∂ W (d_out, d_in) by target, the mean over the batches; CalibrationError where it has no direction."""
    batches = calibration_batches(calibration_data, variant)
    gradients = collect_gradients(model, targets, batches, loss=loss_of)
    if zero := [name for name, gradient in gradients.items() if not gradient.any()]:
        raise CalibrationError(
            f"the gradient of the loss at {zero[0]} is zero on the calibration data ({len(zero)} layers in all); give "
            "other batches, or leave the layer out by exclude_names"
        )
    return gradients


def loss_of(output: Any, batch: Any) -> Tensor:
    """The model's own, where batches hold labels; else that of the next token of `input_ids`, padding left out; else
    the mean square of the output."""
    loss, logits = getattr(output, "loss", None), getattr(output, "logits", output)
    if loss is None and isinstance(batch, Mapping) and "input_ids" in batch:
        following = batch["input_ids"][:, 1:]
        if (mask := batch.get("attention_mask")) is not None:
            following = following.masked_fill(mask[:, 1:] == 0, -100)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), following.flatten())
    return logits.float().square().mean() if loss is None else loss
