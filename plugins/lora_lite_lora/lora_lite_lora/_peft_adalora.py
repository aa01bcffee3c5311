"""How AdaLoRA is written in PEFT's directories, and read. PEFT cuts what it has left out, and keeps the scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_lite_core import ConfigError

NAMES = {"total_step": "total_step", "tinit": "tinit", "tfinal": "tfinal", "interval": "deltaT"}
NAMES |= {"beta1": "beta1", "beta2": "beta2"}


def to_peft(params: dict[str, Tensor], cfg: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    fields: dict[str, Any] = {theirs: getattr(cfg, ours) for ours, theirs in NAMES.items()}
    fields |= {"peft_type": "ADALORA", "init_r": cfg.r, "target_r": cfg.target_r or -(-2 * cfg.r // 3)}
    fields |= {"lora_alpha": cfg.r if cfg.alpha is None else cfg.alpha, "lora_dropout": cfg.dropout}
    fields["orth_reg_weight"] = 0.5 if cfg.orth_reg_weight else 0.0  # PEFT's default
    left = params["lora_l"] * params["lora_m"]
    return fields, {"lora_A": params["lora_Q"], "lora_E": left[:, None], "lora_B": params["lora_P"]}


def from_peft(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    if config["peft_type"] != "ADALORA":
        return None
    r, alpha = config["init_r"], config["lora_alpha"]
    for name in ("r", "use_rslora"):  # PEFT does not use them here
        config.get(name)
    Q, l, P = tensors["lora_A"], tensors["lora_E"].flatten(), tensors["lora_B"]
    if r > max(Q.shape[1], len(P)):
        raise ConfigError(f"init_r={r} is more than the {max(Q.shape[1], len(P))} dimensions of the layer")
    gone = r - len(l)
    if gone < 0 or (gone and not config.get("rank_pattern")):
        raise ConfigError(f"lora_E has {len(l)} singular values, but init_r={r} and rank_pattern has none of it")
    fields = {ours: config[theirs] for ours, theirs in NAMES.items()}
    fields |= {"r": r, "alpha": alpha if alpha > 0 else None, "dropout": config.get("lora_dropout") or 0.0}
    fields["target_r"] = min(config["target_r"], r)
    if not config["orth_reg_weight"]:
        fields["orth_reg_weight"] = 0.0
    values = {"lora_Q": F.pad(Q, (0, 0, 0, gone)), "lora_l": F.pad(l, (0, gone)), "lora_P": F.pad(P, (0, gone))}
    for name in tuple(values):
        values |= {f"{name}_{of}": torch.zeros_like(values[name]) for of in ("mean", "unsure")}
    return fields, {**values, "lora_m": F.pad(torch.ones_like(l), (0, gone))}
