"""The same as `_peft`, for LN-tuning: PEFT keeps whole norms, what is kept here is relative to the frozen one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]

from lora_lite_core import ConfigError, MergeError, base_forward

from ._peft import Pair, full

OTHER_NORMS = (_NormBase, nn.GroupNorm)  # whose channels are not the last dimension
WEIGHT, BIAS = "ln_tuning_layers.weight", "ln_tuning_layers.bias"


@torch.no_grad()
def _gain(layer: Any) -> tuple[Tensor, Tensor]:
    """What the norm multiplies by, its weight w or 1 + w, and w itself.

    What a norm returns for −x is what it returns for x, but for the bias, with the other sign, and has mean square 1
    where it is divided by the right one of the two.
    """
    weight = full(layer.weight.detach())
    if weight.dim() != 1:
        raise ConfigError(f"a {type(layer).__name__} is no norm")
    x = torch.randn(64, weight.shape[-1], generator=torch.Generator().manual_seed(0)).to(layer.weight)
    odd = full(base_forward(layer, x) - base_forward(layer, -x)) / 2
    for gain in (weight, 1 + weight):
        held = gain != 0
        square = (odd[:, held] / gain[held]).square().mean() if bool(held.any()) else weight.new_tensor(0.0)
        if abs(float(square) - 1) < 0.05:
            return gain, weight
    raise ConfigError(f"a {type(layer).__name__} does not multiply what it has normalised by its weight, or by 1 + it")


def ln_to_peft(params: dict[str, Tensor], layer: Any) -> Pair:
    try:
        gain, weight = _gain(layer)
    except ConfigError as error:
        raise MergeError(str(error)) from error
    g = full(params["lora_g"])
    tensors = {WEIGHT: weight + g * gain}
    if "lora_shift" in params:
        tensors[BIAS] = (1 + g) * full(layer.bias.detach()) + full(params["lora_shift"])
    return {"peft_type": "LN_TUNING"}, tensors


def ln_from_peft(config: dict[str, Any], tensors: dict[str, Tensor], layer: Any) -> Pair | None:
    if config["peft_type"] != "LN_TUNING":
        return None
    if isinstance(layer, OTHER_NORMS):
        raise ConfigError(f"a {type(layer).__name__} has no weight over the last dimension")
    gain, weight = _gain(layer)
    change = full(tensors[WEIGHT]).to(weight.device) - weight
    if bool(((gain == 0) & (change != 0)).any()):
        raise ConfigError("the norm multiplies by 0 where the folder changes its weight, which no factor can do")
    g = torch.where(gain == 0, 0, change / torch.where(gain == 0, 1, gain))
    values = {"lora_g": g}
    if getattr(layer, "bias", None) is not None:
        values["lora_shift"] = full(tensors[BIAS]).to(g) - (1 + g) * full(layer.bias.detach())
    return {}, values
