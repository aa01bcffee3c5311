"""How the methods of this package are written in PEFT's directories, and read: a pair for each; here HRA, BEFT."""

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


def of_images(layer: nn.Module, method: str) -> None:
    """MergeError for what is neither an nn.Linear nor an nn.Conv2d that PEFT runs as it is."""
    if not isinstance(layer, nn.Conv2d):
        return linear_only(layer, method)
    for name in ("kernel_size", "stride", "padding"):
        if len({*getattr(layer, name)}) > 1:
            raise MergeError(f"PEFT's {method} takes the first of {name}={getattr(layer, name)} for both dimensions")
    if max(layer.dilation) > 1:
        raise MergeError(f"PEFT's {method} runs without dilation={layer.dilation}")
    if layer.padding_mode != "zeros":
        raise MergeError(f"padding_mode={layer.padding_mode!r}: PEFT's {method} pads with zeros")
    return None


def read_of_images(layer: nn.Module, method: str) -> None:
    """The same as a ConfigError."""
    try:
        of_images(layer, method)
    except MergeError as error:
        raise ConfigError(str(error)) from error


def hra_to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> Pair:
    of_images(layer, "HRA")
    return {"peft_type": "HRA", "r": cfg.r, "apply_GS": False, "bias": "none"}, {"hra_u": params["lora_U"].T}


def hra_from_peft(config: dict[str, Any], tensors: dict[str, Tensor], layer: nn.Module) -> Pair | None:
    if config["peft_type"] != "HRA":
        return None
    if isinstance(layer, CONVOLUTIONS):
        read_of_images(layer, "HRA")
    refuse(config, "apply_GS")
    return {"r": config["r"]}, {"lora_U": tensors["hra_u"].mT}


def beft_to_peft(params: dict[str, Tensor], layer: nn.Module) -> Pair:
    linear_only(layer, "BEFT")
    return {"peft_type": "BEFT"}, {"beft_bias": params["lora_shift"][None]}


def beft_from_peft(config: dict[str, Any], tensors: dict[str, Tensor]) -> Pair | None:
    if config["peft_type"] != "BEFT":
        return None
    return {}, {"lora_shift": tensors["beft_bias"].flatten()}
