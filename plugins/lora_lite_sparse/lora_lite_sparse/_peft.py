"""How SHiRA, Super-Tuning and C3A are written in PEFT's directories, and read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lite_core import ConfigError, MergeError

BESIDE = {"lora_A": "supertuning_lora_A.weight", "lora_B": "supertuning_lora_B.weight"}
Pair = tuple[dict[str, Any], dict[str, Tensor]]


def _linear_only(layer: nn.Module, method: str) -> None:
    if not isinstance(layer, nn.Linear):
        raise MergeError(f"PEFT's {method} takes nn.Linear layers, not a {type(layer).__name__}")


def _inside(where: Tensor, layer: Any, count: int) -> Tensor:
    """A folder's places as row · d_in + column, which are of a stranger."""
    if where.shape != (count,) or where.min() < 0 or where.max() >= layer.in_features * layer.out_features:
        raise ConfigError(f"its indices are not {count} places in ({layer.out_features}, {layer.in_features})")
    return where


def shira_to_peft(params: dict[str, Tensor], cfg: Any, layer: Any) -> Pair:
    _linear_only(layer, "SHiRA")
    where, d_in = params["lora_places"], layer.in_features
    tensors = {"shira_indices": torch.stack([where // d_in, where % d_in]).int(), "shira_weight": params["lora_values"]}
    return {"peft_type": "SHIRA", "r": cfg.r, "mask_type": "random"}, tensors


def shira_from_peft(config: dict[str, Any], tensors: dict[str, Tensor], layer: Any) -> Pair | None:
    if config["peft_type"] != "SHIRA":
        return None
    for name in ("mask_type", "random_seed"):  # the places are in the folder
        config.get(name)
    values, (row, column) = tensors["shira_weight"], tensors["shira_indices"].long()  # floats, where Windows has saved
    if column.min() < 0 or column.max() >= layer.in_features:
        raise ConfigError(f"shira_indices holds columns that are none of {layer.in_features}")
    where = _inside(row * layer.in_features + column, layer, len(values))
    return {"r": config["r"]}, {"lora_places": where, "lora_values": values}


def super_to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> Pair:
    _linear_only(layer, "Super-Tuning")
    if int(params["lora_places"].max()) >= 2**31:
        raise MergeError("PEFT's Super-Tuning counts entries with 32 bits, and the layer has more")
    fields = {"peft_type": "SUPERTUNING", "sparsity": cfg.sparsity, "select_top": not cfg.smallest}
    tensors = {"supertuning_indices": params["lora_places"].int(), "supertuning_values": params["lora_values"]}
    if cfg.r:
        fields |= {"r": cfg.r, "lora_alpha": cfg.r if cfg.alpha is None else cfg.alpha}
        tensors |= {name: params[ours] for ours, name in BESIDE.items()}
    return {**fields, "save_precomputed_indices": True}, tensors


def super_from_peft(config: dict[str, Any], tensors: dict[str, Tensor], layer: Any) -> Pair | None:
    if config["peft_type"] != "SUPERTUNING":
        return None
    if not config.get("save_precomputed_indices", True):
        raise ConfigError("save_precomputed_indices=False leaves out which entries they are; save it with them")
    values = tensors["supertuning_values"]
    where = _inside(tensors["supertuning_indices"].long(), layer, len(values))
    fields = {"sparsity": config["sparsity"], "smallest": not config.get("select_top", True)}
    found = {"lora_places": where, "lora_values": values}
    if config.get("r"):
        fields |= {"r": config["r"], "alpha": config["lora_alpha"]}
        found |= {ours: tensors[name] for ours, name in BESIDE.items()}
    return fields, found


def c3a_to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> Pair:
    _linear_only(layer, "C3A")
    return {"peft_type": "C3A", "block_size": cfg.block_size}, {"c3a_kernel": params["lora_kernels"]}


def c3a_from_peft(config: dict[str, Any], tensors: dict[str, Tensor]) -> Pair | None:
    if config["peft_type"] != "C3A":
        return None
    for name in ("block_size", "block_size_pattern"):  # the kernels tell
        config.get(name)
    return {"block_size": tensors["c3a_kernel"].shape[-1]}, {"lora_kernels": tensors["c3a_kernel"]}
