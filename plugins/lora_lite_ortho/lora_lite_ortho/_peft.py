"""How the methods of this package are written in PEFT's directories, and read: a pair for each; here IA3, HRA, BEFT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lite_core import ConfigError, MergeError

Pair = tuple[dict[str, Any], dict[str, Tensor]]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def full(tensor: Tensor) -> Tensor:
    """At least float32: 1 + g would round a small g away in bfloat16."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def refuse(config: dict[str, Any], *names: str) -> None:
    """Fields that are on and mean something else than what the variant computes."""
    for name in names:
        if config.get(name) not in (None, False, "none"):
            raise ConfigError(f"{name}={config[name]!r} is not what this variant computes")


def linear_only(layer: nn.Module, method: str) -> None:
    if not isinstance(layer, nn.Linear):
        raise MergeError(f"PEFT's {method} takes nn.Linear layers, not a {type(layer).__name__}")


def ia3_to_peft(params: dict[str, Tensor]) -> Pair:
    return {"peft_type": "IA3", "feedforward_modules": []}, {"ia3_l": 1 + full(params["lora_g"])[:, None]}


def ia3_ff_to_peft(params: dict[str, Tensor]) -> Pair:
    return {"peft_type": "IA3", "feedforward_modules": "$target_modules"}, {"ia3_l": 1 + full(params["lora_g"])[None]}


def _ia3_from_peft(config: dict[str, Any], tensors: dict[str, Tensor], layer: nn.Module, inputs: bool) -> Pair | None:
    """PEFT writes gates of outputs as (d_out, 1), of a convolution as (1, channels, 1 …), and those of inputs, in
    feedforward modules, as (1, d_in)."""
    if config["peft_type"] != "IA3" or bool(config.get("feedforward_modules")) is not inputs:
        return None
    gate = tensors["ia3_l"]
    if isinstance(layer, CONVOLUTIONS):
        if inputs:
            raise ConfigError(
                f"of a {type(layer).__name__} PEFT gates input channels, and this variant each entry of patches"
            )
        gate = gate.mT
    if gate.dim() != 2 or gate.shape[0 if inputs else 1] != 1:
        raise ConfigError(f"ia3_l has the shape {tuple(gate.shape)}; feedforward_modules says {inputs} of this module")
    return {}, {"lora_g": full(gate).flatten() - 1}


def ia3_from_peft(config: dict[str, Any], tensors: dict[str, Tensor], layer: nn.Module) -> Pair | None:
    return _ia3_from_peft(config, tensors, layer, inputs=False)


def ia3_ff_from_peft(config: dict[str, Any], tensors: dict[str, Tensor], layer: nn.Module) -> Pair | None:
    return _ia3_from_peft(config, tensors, layer, inputs=True)


def hra_to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> Pair:
    linear_only(layer, "HRA")
    return {"peft_type": "HRA", "r": cfg.r, "apply_GS": False, "bias": "none"}, {"hra_u": params["lora_U"].T}


def hra_from_peft(config: dict[str, Any], tensors: dict[str, Tensor]) -> Pair | None:
    if config["peft_type"] != "HRA":
        return None
    refuse(config, "apply_GS")
    return {"r": config["r"]}, {"lora_U": tensors["hra_u"].mT}


def beft_to_peft(params: dict[str, Tensor], layer: nn.Module) -> Pair:
    linear_only(layer, "BEFT")
    return {"peft_type": "BEFT"}, {"beft_bias": params["lora_shift"][None]}


def beft_from_peft(config: dict[str, Any], tensors: dict[str, Tensor]) -> Pair | None:
    if config["peft_type"] != "BEFT":
        return None
    return {}, {"lora_shift": tensors["beft_bias"].flatten()}
