"""How HiRA is written in PEFT's directories, and read."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_lite_core import ConfigError, MergeError

Pair = tuple[dict[str, Any], dict[str, Tensor]]


def _kind(layer: nn.Module) -> str | None:
    """What PEFT puts before the names of an embedding's factors; None for a convolution, whose product it reshapes."""
    if isinstance(layer, nn.Embedding):
        return "hira_embedding_"
    return None if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else "hira_"


def to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> Pair:
    if (prefix := _kind(layer)) is None:
        raise MergeError("PEFT's HiRA has factors of another form for convolutions; merge(model) writes the weights")
    # No rank_pattern: PEFT's config has one, and its layers all get r.
    fields = {"peft_type": "HIRA", "r": cfg.r, "hira_dropout": cfg.dropout, "init_weights": True}
    return fields, {f"{prefix}{side}": params[f"lora_{side}"] for side in "AB"}


def from_peft(config: dict[str, Any], tensors: dict[str, Tensor], layer: nn.Module) -> Pair | None:
    if config["peft_type"] != "HIRA":
        return None
    if (prefix := _kind(layer)) is None:
        raise ConfigError("PEFT's HiRA has factors of another form for convolutions")
    for name in ("r", "init_weights"):  # its layers do not follow rank_pattern, and how its factors started
        config.get(name)
    values = {f"lora_{side}": tensors[f"{prefix}{side}"] for side in "AB"}
    return {"r": len(values["lora_A"]), "dropout": config.get("hira_dropout") or 0.0}, values
