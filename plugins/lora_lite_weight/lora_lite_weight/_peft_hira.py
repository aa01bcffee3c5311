"""How HiRA is written in PEFT's directories, and read."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_lite_core import ConfigError, MergeError

Pair = tuple[dict[str, Any], dict[str, Tensor]]


def _prefix(layer: nn.Module) -> str:
    """What PEFT puts before the names of the factors."""
    return "hira_embedding_" if isinstance(layer, nn.Embedding) else "hira_"


def _differs(layer: nn.Module) -> str:
    """Where PEFT computes something else."""
    mode = getattr(layer, "padding_mode", "zeros")  # of convolutions
    return "" if mode == "zeros" else f"padding_mode={mode!r}: PEFT's HiRA pads with zeros"


def to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> Pair:
    if differs := _differs(layer):
        raise MergeError(differs)
    A, B = params["lora_A"], params["lora_B"]
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):  # as two convolutions, the second of single pixels
        A, B = A.unflatten(1, layer.weight.shape[1:]), B.reshape(*B.shape, *(1 for _ in layer.kernel_size))
    # No rank_pattern: PEFT's config has one, and its layers all get r.
    fields = {"peft_type": "HIRA", "r": cfg.r, "hira_dropout": cfg.dropout, "init_weights": True}
    return fields, {f"{_prefix(layer)}A": A, f"{_prefix(layer)}B": B}


def from_peft(config: dict[str, Any], tensors: dict[str, Tensor], layer: nn.Module) -> Pair | None:
    if config["peft_type"] != "HIRA":
        return None
    if differs := _differs(layer):
        raise ConfigError(differs)
    for name in ("r", "init_weights"):  # its layers do not follow rank_pattern, and how its factors started
        config.get(name)
    values = {f"lora_{side}": tensors[f"{_prefix(layer)}{side}"] for side in "AB"}
    return {"r": len(values["lora_A"]), "dropout": config.get("hira_dropout") or 0.0}, values
