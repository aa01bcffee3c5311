"""How Poly is written in PEFT's directories, and read: (splits, skills, width / splits, r)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_lite_core import ConfigError, MergeError

COUNTS = {"tasks": "n_tasks", "skills": "n_skills", "splits": "n_splits"}


def to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not isinstance(layer, nn.Linear):
        raise MergeError(f"PEFT's Poly takes nn.Linear layers, not a {type(layer).__name__}")
    A = params["lora_A"].unflatten(0, (cfg.skills, cfg.r)).unflatten(-1, (cfg.splits, -1))
    B = params["lora_B"].unflatten(0, (cfg.splits, -1)).unflatten(-1, (cfg.skills, cfg.r))
    fields = {"peft_type": "POLY", "poly_type": "poly", "r": cfg.r, "init_weights": True}
    fields |= {theirs: getattr(cfg, ours) for ours, theirs in COUNTS.items()}
    tensors = {"poly_lora_A": A.permute(2, 0, 3, 1), "poly_lora_B": B.permute(0, 2, 3, 1)}
    return fields, {**tensors, "poly_router.module_logits": params["lora_Z"]}


def from_peft(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    if config["peft_type"] != "POLY":
        return None
    if config.get("poly_type", "poly") != "poly":
        raise ConfigError(f"poly_type={config['poly_type']!r}: PEFT has 'poly' alone")
    A, B = tensors["poly_lora_A"], tensors["poly_lora_B"]
    fields = {"r": config["r"], **{ours: config[theirs] for ours, theirs in COUNTS.items()}}
    if A.dim() != 4 or B.dim() != 4:
        raise ConfigError(f"poly_lora_A {tuple(A.shape)} and poly_lora_B {tuple(B.shape)} have not four dimensions")
    values = {
        "lora_A": A.permute(1, 3, 0, 2).flatten(2).flatten(0, 1),
        "lora_B": B.permute(0, 3, 1, 2).flatten(2).flatten(0, 1),
    }
    return fields, {**values, "lora_Z": tensors["poly_router.module_logits"]}
