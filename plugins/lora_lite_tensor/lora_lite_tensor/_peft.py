"""How LoHa and LoKr are written in PEFT's directories, and read."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_lite_core import MergeError

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


def loha_from_peft(config: dict[str, Any], tensors: dict[str, Tensor]) -> Pair | None:
    if config["peft_type"] != "LOHA":
        return None
    config.get("use_effective_conv2d")  # told by the tensors: t1 and t2 are read by nobody
    fields = {"r": config["r"], "alpha": config["alpha"]}
    return fields, {ours: tensors[theirs] for ours, theirs in _HADAMARD.items()}


def lokr_to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> Pair:
    fields = _fields(cfg, layer, "LoKr")
    fields |= {"decompose_both": cfg.decompose_both, "decompose_factor": cfg.decompose_factor}
    return fields, {name.replace("lora_", "lokr_"): tensor for name, tensor in params.items()}


def lokr_from_peft(config: dict[str, Any], tensors: dict[str, Tensor]) -> Pair | None:
    if config["peft_type"] != "LOKR":
        return None
    for name in ("use_effective_conv2d", "rank_dropout_scale"):  # told by the tensors; of rank_dropout alone
        config.get(name)
    fields = {"r": config["r"], "alpha": config["alpha"]}
    fields |= {"decompose_both": bool(config.get("decompose_both")), "decompose_factor": config["decompose_factor"]}
    return fields, {f"lora_{name}": tensors[f"lokr_{name}"] for name in _KRONECKER if f"lokr_{name}" in tensors}
