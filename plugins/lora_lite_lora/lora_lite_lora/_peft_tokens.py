"""How trainable tokens are written in PEFT's directories, and read: the rows themselves, not their offsets."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_lite_core import dense_weight

NAMES = ("trainable_tokens_delta", "token_adapter.trainable_tokens_delta")  # alone, and beside another method


def rows_of(layer: nn.Module, ids: Any) -> Tensor:
    """Of the weight as the layer keeps it: a scale that an embedding has on top is not in it."""
    return layer.weight[ids] if isinstance(layer, nn.Embedding) else dense_weight(layer)[ids]


def to_peft(params: dict[str, Tensor], cfg: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    fields = {"peft_type": "TRAINABLE_TOKENS", "token_indices": list(cfg.rows), "init_weights": True}
    return fields, {NAMES[0]: params["lora_start"] + params["lora_rows"]}


def from_peft(
    config: dict[str, Any], tensors: dict[str, Tensor], layer: nn.Module
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    if config["peft_type"] != "TRAINABLE_TOKENS":
        return None
    rows = config["token_indices"]
    values = tensors[next(name for name in NAMES if name in tensors)]
    start = rows_of(layer, list(rows)).detach().to(values)
    return {"rows": tuple(rows), "tied": config.get("$tied", True), "target_names": ()}, {
        "lora_rows": values - start,
        "lora_start": start,
    }
