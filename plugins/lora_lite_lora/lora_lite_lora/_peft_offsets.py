"""How a low-rank change that starts from frozen factors A0, B0 is written in PEFT's directories: as a plain LoRA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_peft(params: dict[str, Tensor], cfg: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """dB (A0 + dA) + B0 dA as a product of rank 2r, on the base as it is: the form that PEFT's own conversion has."""
    A0, B0, dA, dB = (params[f"lora_{key}"] for key in ("A0", "B0", "dA", "dB"))
    full = torch.promote_types(A0.dtype, torch.float32)
    alpha = 2 * (cfg.r if cfg.alpha is None else cfg.alpha)
    fields = {"peft_type": "LORA", "r": 2 * cfg.r, "lora_alpha": alpha, "lora_dropout": cfg.dropout}
    fields |= {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    A = torch.cat([A0.to(full) + dA.to(full), dA.to(full)])
    return fields, {"lora_A.weight": A, "lora_B.weight": torch.cat([dB, B0], 1).to(full)}
