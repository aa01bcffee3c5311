"""The diagonal of the empirical Fisher information of frozen weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_lite_core import Target, calibration_batches, collect_gradients


def fisher_information(model: nn.Module, targets: tuple[Target, ...], data: Any) -> list[Tensor]:
    """The sum over the batches of the squared gradient of each one's loss, (d_out, d_in) for each target."""
    found: dict[str, Tensor] = {}
    for batch in calibration_batches(data, "fish_mask"):
        for name, gradient in collect_gradients(model, targets, [batch], loss=_loss).items():
            found[name] = found[name] + gradient.square() if name in found else gradient.square()
    return [found[target.name] for target in targets]


def _loss(output: Any, batch: Any) -> Any:
    """What the output holds, or its mean square where it is a tensor with more than one number."""
    if isinstance(output, Tensor):
        return output if output.numel() == 1 else output.float().square().mean()
    return output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
