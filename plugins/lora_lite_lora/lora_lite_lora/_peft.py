"""How LoRA is written in PEFT's directories, and read."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lora_lite_core import ConfigError

OTHERS = ("kasa_config", "use_dora", "use_qalora", "alora_invocation_tokens")  # what makes another variant of it


def to_peft(params: dict[str, Tensor], cfg: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    alpha = cfg.r if cfg.alpha is None else cfg.alpha
    fields = {"peft_type": "LORA", "r": cfg.r, "lora_alpha": alpha, "use_rslora": cfg.rslora}
    fields["lora_dropout"] = cfg.dropout
    fields |= {"rank_pattern": {}, "alpha_pattern": {}}
    return fields, {"lora_A.weight": params["lora_A"], "lora_B.weight": params["lora_B"]}


def from_peft(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    if config["peft_type"] != "LORA" or any(config.get(name) for name in OTHERS):
        return None
    if config.get("lora_bias"):
        raise ConfigError(f"lora_bias={config['lora_bias']!r} is more than a low-rank product")
    fields = {"r": config["r"], "alpha": config["lora_alpha"], "rslora": bool(config.get("use_rslora"))}
    fields["dropout"] = config.get("lora_dropout") or 0.0
    return fields, {"lora_A": tensors["lora_A.weight"], "lora_B": tensors["lora_B.weight"]}
