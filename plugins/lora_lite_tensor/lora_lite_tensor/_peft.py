"""How LoHa and LoKr are written in PEFT's directories, and read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lite_core import ConfigError, MergeError

Pair = tuple[dict[str, Any], dict[str, Tensor]]
_HADAMARD = {"lora_B1": "hada_w1_a", "lora_A1": "hada_w1_b", "lora_B2": "hada_w2_a", "lora_A2": "hada_w2_b"}
_KRONECKER = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")


def _fields(cfg: Any, layer: nn.Module, method: str) -> dict[str, Any]:
    if not isinstance(layer, nn.Linear):
        raise MergeError(f"PEFT's {method} is read of nn.Linear layers here, not of a {type(layer).__name__}")
    alpha = cfg.r if cfg.alpha is None else cfg.alpha
    return {"peft_type": method.upper(), "r": cfg.r, "alpha": alpha, "rank_pattern": {}, "alpha_pattern": {}}


def loha_to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> Pair:
    return _fields(cfg, layer, "LoHa"), {theirs: params[ours] for ours, theirs in _HADAMARD.items()}


def loha_from_peft(config: dict[str, Any], tensors: dict[str, Tensor], layer: Any) -> Pair | None:
    if config["peft_type"] != "LOHA":
        return None
    config.get("use_effective_conv2d")  # told by the tensors
    values = {ours: tensors[theirs] for ours, theirs in _HADAMARD.items()}
    for i in (1, 2):
        if (core := tensors.get(f"hada_t{i}")) is not None:  # A over channels, the kernel in a tensor of its own
            core = core.reshape(*values[f"lora_A{i}"].shape[:1], -1, *layer.kernel_size)
            values[f"lora_A{i}"] = torch.einsum("rj...,jc->rc...", core, values[f"lora_A{i}"]).flatten(1)
            values[f"lora_B{i}"] = values[f"lora_B{i}"].mT
    return {"r": config["r"], "alpha": config["alpha"]}, values


def lokr_to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> Pair:
    fields = _fields(cfg, layer, "LoKr")
    fields |= {"decompose_both": cfg.decompose_both, "decompose_factor": cfg.decompose_factor}
    return fields, {name.replace("lora_", "lokr_"): tensor for name, tensor in params.items()}


def lokr_from_peft(config: dict[str, Any], tensors: dict[str, Tensor], layer: nn.Module) -> Pair | None:
    if config["peft_type"] != "LOKR":
        return None
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and layer.weight[0, 0].numel() > 1:
        kind = type(layer).__name__
        raise ConfigError(f"of a {kind} PEFT splits the channels, and this variant whole patches: another product")
    for name in ("use_effective_conv2d", "rank_dropout_scale"):  # told by the tensors; of rank_dropout alone
        config.get(name)
    fields = {"r": config["r"], "alpha": config["alpha"]}
    fields |= {"decompose_both": bool(config.get("decompose_both")), "decompose_factor": config["decompose_factor"]}
    return fields, {f"lora_{name}": tensors[f"lokr_{name}"] for name in _KRONECKER if f"lokr_{name}" in tensors}
