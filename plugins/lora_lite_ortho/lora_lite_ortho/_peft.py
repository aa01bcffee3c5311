"""How the methods of this package are written in PEFT's directories, and read: a pair for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lite_core import ConfigError, MergeError

Pair = tuple[dict[str, Any], dict[str, Tensor]]


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


def _ia3_from_peft(config: dict[str, Any], tensors: dict[str, Tensor], side: int) -> Pair | None:
    """PEFT writes gates of outputs as (d_out, 1) and those of inputs as (1, d_in): `side` is the one that is 1."""
    if config["peft_type"] != "IA3" or tensors["ia3_l"].shape[side] != 1:
        return None
    return {}, {"lora_g": full(tensors["ia3_l"]).flatten() - 1}


def ia3_from_peft(config: dict[str, Any], tensors: dict[str, Tensor]) -> Pair | None:
    return _ia3_from_peft(config, tensors, 1)


def ia3_ff_from_peft(config: dict[str, Any], tensors: dict[str, Tensor]) -> Pair | None:
    return _ia3_from_peft(config, tensors, 0)


def hra_to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> Pair:
    linear_only(layer, "HRA")
    return {"peft_type": "HRA", "r": cfg.r, "apply_GS": False, "bias": "none"}, {"hra_u": params["lora_U"].T}


def hra_from_peft(config: dict[str, Any], tensors: dict[str, Tensor]) -> Pair | None:
    if config["peft_type"] != "HRA":
        return None
    refuse(config, "apply_GS", "bias")
    return {"r": config["r"]}, {"lora_U": tensors["hra_u"].T}


def oft_to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> Pair:
    linear_only(layer, "OFT")
    fields = {"peft_type": "OFT", "r": 0, "oft_block_size": cfg.block_size, "use_cayley_neumann": False, "bias": "none"}
    return fields, {"oft_R.weight": params["lora_q"]}


def oft_from_peft(config: dict[str, Any], tensors: dict[str, Tensor]) -> Pair | None:
    if config["peft_type"] != "OFT":
        return None
    if config.get("use_cayley_neumann", True):
        raise ConfigError("use_cayley_neumann=True is a truncated series; this variant turns exactly, as False does")
    refuse(config, "coft", "block_share", "bias")
    pairs = tensors["oft_R.weight"].shape[1]  # b (b − 1) / 2
    return {"block_size": round((1 + (1 + 8 * pairs) ** 0.5) / 2)}, {"lora_q": tensors["oft_R.weight"]}


def road_to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Linear) -> Pair:
    linear_only(layer, "RoAd")
    group = cfg.group_size or next(size for size in range(64, 0, -2) if layer.out_features % size == 0)
    fields = {"peft_type": "ROAD", "variant": f"road_{cfg.mode}", "group_size": group}
    return fields, {"road_theta": params["lora_theta"], "road_alpha": 1 + full(params["lora_alpha"])}


def road_from_peft(config: dict[str, Any], tensors: dict[str, Tensor]) -> Pair | None:
    if config["peft_type"] != "ROAD":
        return None
    fields = {"mode": int(str(config["variant"]).rpartition("_")[2]), "group_size": config["group_size"]}
    return fields, {"lora_theta": tensors["road_theta"], "lora_alpha": full(tensors["road_alpha"]) - 1}
