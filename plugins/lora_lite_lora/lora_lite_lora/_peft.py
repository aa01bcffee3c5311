"""How LoRA is written in PEFT's directories, and read."""

from __future__ import annotations

from collections.abc import Mapping
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


def from_peft(
    config: dict[str, Any], tensors: dict[str, Tensor], name: str, sizes: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    on = [one for one in OTHERS if config.get(one)]
    if on == ["use_qalora"] and _all_inputs(config, tensors, sizes[name]):
        on = []
    if config["peft_type"] != "LORA" or on or isinstance(config.get("init_lora_weights"), str):
        return None
    if config.get("lora_bias"):
        raise ConfigError(f"lora_bias={config['lora_bias']!r} is more than a low-rank product")
    fields = {"r": config["r"], "alpha": config["lora_alpha"], "rslora": bool(config.get("use_rslora"))}
    fields["dropout"] = config.get("lora_dropout") or 0.0
    return fields, {"lora_A": tensors["lora_A.weight"], "lora_B": tensors["lora_B.weight"]}


def _all_inputs(config: dict[str, Any], tensors: dict[str, Tensor], sizes: tuple[int, int]) -> bool:
    """Whether A reads single inputs: on layers that are not GPTQ's PEFT makes a LoRA for use_qalora, too."""
    A = tensors.get("lora_A.weight")
    return config.get("qalora_group_size") != 1 and A is not None and A.shape[-1:] == sizes[:1]
