"""How GraLoRA and MiSS are written in PEFT's directories, and read."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_lite_core import ConfigError, MergeError

Pair = tuple[dict[str, Any], dict[str, Tensor]]


def _linear_only(layer: nn.Module, method: str, *others: str) -> None:
    if not isinstance(layer, nn.Linear) and type(layer).__name__ not in others:
        raise MergeError(f"PEFT's {method} takes nn.Linear layers, not a {type(layer).__name__}")


def _no_bias(config: dict[str, Any]) -> None:
    if config.get("bias") not in (None, "none"):
        raise ConfigError(f"bias={config['bias']!r}: biases are trained beside a LoRA alone")


def gralora_to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> Pair:
    _linear_only(layer, "GraLoRA", "Conv1D")
    alpha = cfg.r + cfg.hybrid_r if cfg.alpha is None else cfg.alpha
    fields = {"peft_type": "GRALORA", "r": cfg.r, "hybrid_r": cfg.hybrid_r, "alpha": alpha, "gralora_k": cfg.k}
    tensors = {
        "gralora_A": params["lora_A"].unflatten(1, (cfg.k, -1)).permute(1, 2, 0),
        "gralora_B": params["lora_B"].unflatten(0, (cfg.k, -1)).transpose(1, 2),
    }
    if cfg.hybrid_r:
        tensors["gralora_A_general.weight"] = params["lora_A_hybrid"]
        tensors["gralora_B_general.weight"] = params["lora_B_hybrid"]
    return {**fields, "gralora_dropout": cfg.dropout, "bias": "none"}, tensors


def gralora_from_peft(config: dict[str, Any], tensors: dict[str, Tensor]) -> Pair | None:
    if config["peft_type"] != "GRALORA":
        return None
    _no_bias(config)
    hybrid, A, B = config["hybrid_r"], tensors["gralora_A"], tensors["gralora_B"]
    fields = {"r": config["r"], "hybrid_r": hybrid, "alpha": config["alpha"], "k": config["gralora_k"]}
    fields["dropout"] = config.get("gralora_dropout") or 0.0
    values = {"lora_A": A.permute(2, 0, 1).flatten(1), "lora_B": B.transpose(1, 2).flatten(0, 1)}
    if hybrid:
        values["lora_A_hybrid"] = tensors["gralora_A_general.weight"]
        values["lora_B_hybrid"] = tensors["gralora_B_general.weight"]
    return fields, values


def miss_to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> Pair:
    _linear_only(layer, "MiSS")
    D = params["lora_D"] * cfg.scale  # PEFT has no scale, and D is linear in what it adds
    fields = {"peft_type": "MISS", "r": cfg.r, "miss_dropout": cfg.dropout, "bias": "none"}
    fields["init_weights"] = True if cfg.mode == "default" else cfg.mode
    fields["mini_r"] = cfg.mini_r if cfg.mode == "mini" else 1
    return fields, {"miss_block": D.unflatten(0, (-1, cfg.r)) if cfg.mode == "bat" else D.T}


def miss_from_peft(config: dict[str, Any], tensors: dict[str, Tensor]) -> Pair | None:
    if config["peft_type"] != "MISS":
        return None
    _no_bias(config)
    start, mini_r, block = config.get("init_weights"), config.get("mini_r"), tensors["miss_block"]
    mode = start if isinstance(start, str) else "default"
    fields: dict[str, Any] = {"r": config["r"], "mode": mode, "dropout": config.get("miss_dropout") or 0.0}
    if mode == "mini":
        fields["mini_r"] = mini_r
    return fields, {"lora_D": block.flatten(0, 1) if mode == "bat" else block.T}
