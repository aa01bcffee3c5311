"""How PEANuT is written in PEFT's directories, and read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lite_core import ConfigError, MergeError

from ._activations import ACTIVATIONS, IN_PEFT

Pair = tuple[dict[str, Any], dict[str, Tensor]]
STACKS = {"lora_E": "peanut_encoders", "lora_D": "peanut_decoders"}


def to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> Pair:
    if not isinstance(layer, nn.Linear):
        raise MergeError(f"PEFT's PEANuT takes nn.Linear layers, not a {type(layer).__name__}")
    act = {"gelu_tanh": "gelu_pytorch_tanh"}.get(cfg.activation, cfg.activation)
    fields = {"peft_type": "PEANUT", "r": cfg.r, "depth": cfg.depth, "act_fn": act, "scaling": cfg.scale}
    stacks = {
        f"{theirs}.{number}.weight": matrix
        for ours, theirs in STACKS.items()
        for number, matrix in enumerate(params.get(ours, ()))
    }
    factors = {"peanut_A.weight": params["lora_A"], "peanut_B.weight": params["lora_B"]}
    return {**fields, "init_weights": True}, {**factors, **stacks}


def from_peft(config: dict[str, Any], tensors: dict[str, Tensor]) -> Pair | None:
    if config["peft_type"] != "PEANUT":
        return None
    config.get("init_weights")  # how its tensors started
    asked, depth = config.get("act_fn", "relu"), config.get("depth") or 0
    if (act := IN_PEFT.get(asked, asked)) not in ACTIVATIONS:
        raise ConfigError(f"act_fn={asked!r} is none of {', '.join((*ACTIVATIONS, *IN_PEFT))}")
    fields = {"r": config["r"], "depth": depth, "activation": act, "scale": float(config.get("scaling", 1.0))}
    values = {"lora_A": tensors["peanut_A.weight"], "lora_B": tensors["peanut_B.weight"]}
    for ours, theirs in STACKS.items():
        if depth:
            values[ours] = torch.stack([tensors[f"{theirs}.{number}.weight"] for number in range(depth)])
    return fields, values
