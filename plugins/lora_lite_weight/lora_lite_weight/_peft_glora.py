"""The tensors of GLoRA's five parts, and how they are written in PEFT's directories, and read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lite_core import ConfigError, MergeError, ParamSpec, TargetError

Pair = tuple[dict[str, Any], dict[str, Tensor]]
FIELDS = {"weight": "config_A_B", "prompt": "config_C", "bias": "config_D_E"}
PARTS = {"weight": "AB", "prompt": "C", "bias": "DE"}


def specs(d_in: int, d_out: int, cfg: Any, biased: bool) -> dict[str, ParamSpec]:
    found: dict[str, ParamSpec] = {}
    for field, parts in PARTS.items():
        form, size = getattr(cfg, field), d_in if field == "prompt" else d_out
        for part in parts if biased or field == "weight" else "":
            if form == "lora":
                found[f"lora_{part}d"] = ParamSpec((size, cfg.r))
                found[f"lora_{part}u"] = ParamSpec((cfg.r, 1 if field == "prompt" else d_in), "kaiming_uniform")
            elif form != "none":
                found[f"lora_{part}"] = ParamSpec((size if form == "vector" else 1,))
    if not found:
        raise TargetError(
            "the layer has no bias, and GLoRAConfig(weight='none') trains what only a bias takes; leave it out of the "
            "targets by exclude_names"
        )
    return found


def to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> Pair:
    if type(layer) is not nn.Linear:
        raise MergeError(f"PEFT's GLoRA takes nn.Linear layers, not a {type(layer).__name__}")
    fields = {theirs: getattr(cfg, ours) for ours, theirs in FIELDS.items()}
    d_out, d_in = layer.out_features, layer.in_features
    tensors: dict[str, Tensor] = {}
    for part, shape in {"A": (d_out, d_in), "B": (d_out, d_in), "C": (d_in, 1), "D": (d_out,), "E": (d_out,)}.items():
        if f"lora_{part}d" in params:
            tensors |= {f"glora_{part}.X{side}": params[f"lora_{part}{side}"] for side in "du"}
        elif f"lora_{part}" in params:
            value = params[f"lora_{part}"]
            column = part in "ABC" and (part == "C" or cfg.weight == "vector")
            tensors[f"glora_{part}.X"] = value[:, None] if column else value
        else:
            tensors[f"glora_{part}.zeros"] = torch.zeros(shape)  # PEFT's file has them for parts that are left out
    return {"peft_type": "GLORA", "r": cfg.r, **fields, "init_weights": True, "bias": "none"}, tensors


def from_peft(config: dict[str, Any], tensors: dict[str, Tensor], layer: nn.Module) -> Pair | None:
    if config["peft_type"] != "GLORA":
        return None
    if config.get("bias") not in (None, "none"):
        raise ConfigError(f"bias={config['bias']!r} is not what this variant computes")
    config.get("init_weights")  # how its tensors started
    values: dict[str, Tensor] = {}
    for key in tensors:
        part, _, kind = key.removeprefix("glora_").partition(".")
        if kind in ("Xd", "Xu"):
            values[f"lora_{part}{kind[1]}"] = tensors[key]
        elif kind == "X":
            values[f"lora_{part}"] = tensors[key].flatten()
        elif kind == "zeros" and tensors[key].any():
            raise ConfigError(f"{key} is not zero, and stands for a part that is left out")
    return {"r": config["r"], **{ours: config[theirs] for ours, theirs in FIELDS.items()}}, values
