"""How aLoRA is written in PEFT's directories, and read."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def to_peft(params: dict[str, Tensor], cfg: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    fields = {"peft_type": "LORA", "r": cfg.r, "lora_alpha": cfg.r if cfg.alpha is None else cfg.alpha}
    fields |= {"alora_invocation_tokens": list(cfg.invocation_tokens), "lora_dropout": cfg.dropout}
    fields |= {"rank_pattern": {}, "alpha_pattern": {}, "task_type": "CAUSAL_LM"}  # in others PEFT leaves it off
    return fields, {"lora_A.weight": params["lora_A"], "lora_B.weight": params["lora_B"]}


def from_peft(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    if config["peft_type"] != "LORA" or not config.get("alora_invocation_tokens"):
        return None
    grown = config["r"] ** 0.5 if config.get("use_rslora") else 1  # alpha / √r is √r alpha / r
    fields = {"r": config["r"], "alpha": config["lora_alpha"] * grown, "dropout": config.get("lora_dropout") or 0.0}
    fields["invocation_tokens"] = tuple(config["alora_invocation_tokens"])
    return fields, {"lora_A": tensors["lora_A.weight"], "lora_B": tensors["lora_B.weight"]}
