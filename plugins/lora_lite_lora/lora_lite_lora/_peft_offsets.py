"""How a low-rank change that starts from frozen factors A0, B0 is written in PEFT's directories, as a plain LoRA, and
read of those where PEFT makes the factors again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lite_core import start_factors

from ._peft import OTHERS


def to_peft(params: dict[str, Tensor], cfg: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """dB (A0 + dA) + B0 dA as a product of rank 2r, on the base as it is: the form that PEFT's own conversion has."""
    A0, B0, dA, dB = (params[f"lora_{key}"] for key in ("A0", "B0", "dA", "dB"))
    full = torch.promote_types(A0.dtype, torch.float32)
    alpha = 2 * (cfg.r if cfg.alpha is None else cfg.alpha)
    fields = {"peft_type": "LORA", "r": 2 * cfg.r, "lora_alpha": alpha, "lora_dropout": cfg.dropout}
    fields |= {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    A = torch.cat([A0.to(full) + dA.to(full), dA.to(full)])
    return fields, {"lora_A.weight": A, "lora_B.weight": torch.cat([dB, B0], 1).to(full)}


def olora_from_peft(
    config: dict[str, Any], tensors: dict[str, Tensor], layer: nn.Module
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """A and B of a folder; the start is made of the weight again, as PEFT does."""
    if config["peft_type"] != "LORA" or any(config.get(name) for name in OTHERS):
        return None
    if config.get("init_lora_weights") != "olora":
        return None
    A, B, scale = tensors["lora_A.weight"], tensors["lora_B.weight"], config["lora_alpha"] / config["r"]
    if config.get("use_rslora"):
        scale *= config["r"] ** 0.5
    A0, B0 = start_factors(layer, A, B, scale, by="qr")
    values = {"lora_A0": A0, "lora_B0": B0, "lora_dA": A.to(A0) - A0, "lora_dB": B.to(B0) - B0}
    fields = {"r": len(A), "alpha": scale * len(A)}  # PEFT makes no more factors than the weight has
    return {**fields, "dropout": config.get("lora_dropout") or 0.0}, values
