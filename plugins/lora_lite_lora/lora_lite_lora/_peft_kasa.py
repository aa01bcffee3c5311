"""How KaSA is written in PEFT's directories, and read: what is out of the weight is made of it again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lite_core import MergeError, dense_weight, truncated_svd

TRAINED = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_l": "lora_diag"}


def smallest(layer: nn.Module, r: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The r smallest triplets of the weight, σ with the left vectors."""
    U, S, Vh = truncated_svd(dense_weight(layer), r, generator, smallest=True)
    return {"lora_U": U * S, "lora_V": Vh}


def to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not isinstance(layer, nn.Linear):
        raise MergeError(f"PEFT's KaSA takes nn.Linear layers, not a {type(layer).__name__}")
    fields = {"peft_type": "LORA", "r": cfg.r, "lora_alpha": cfg.r if cfg.alpha is None else cfg.alpha}
    fields |= {"lora_dropout": cfg.dropout, "rank_pattern": {}, "alpha_pattern": {}}
    fields["kasa_config"] = {"beta": cfg.beta, "gamma": cfg.gamma}
    return fields, {theirs: params[ours] for ours, theirs in TRAINED.items()}


def from_peft(
    config: dict[str, Any], tensors: dict[str, Tensor], layer: nn.Module
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    if config["peft_type"] != "LORA" or not config.get("kasa_config"):
        return None
    grown = config["r"] ** 0.5 if config.get("use_rslora") else 1  # alpha / √r is √r alpha / r
    fields = {"r": config["r"], "alpha": config["lora_alpha"] * grown, "dropout": config.get("lora_dropout") or 0.0}
    fields |= {name: config["kasa_config"][name] for name in ("beta", "gamma")}
    values = {ours: tensors[theirs] for ours, theirs in TRAINED.items()}
    return fields, {**values, **smallest(layer, len(values["lora_l"]), torch.Generator().manual_seed(0))}
