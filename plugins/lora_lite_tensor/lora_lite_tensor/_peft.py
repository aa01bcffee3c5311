"""How LoHa and LoKr are written in PEFT's directories, and read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lite_core import ConfigError, MergeError

from ._widths import kernel_of

Pair = tuple[dict[str, Any], dict[str, Tensor]]
_HADAMARD = {"lora_B1": "hada_w1_a", "lora_A1": "hada_w1_b", "lora_B2": "hada_w2_a", "lora_A2": "hada_w2_b"}
_KRONECKER = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")


def _differs(layer: nn.Module, method: str) -> str:
    """Where PEFT computes something else."""
    mode = getattr(layer, "padding_mode", "zeros")  # of convolutions
    return "" if mode == "zeros" else f"padding_mode={mode!r}: PEFT's {method} pads with zeros"


def _fields(cfg: Any, layer: nn.Module, method: str) -> dict[str, Any]:
    if not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        raise MergeError(
            f"PEFT's {method} is written of nn.Linear, nn.Conv1d and nn.Conv2d here, not of a {type(layer).__name__}"
        )
    if differs := _differs(layer, method):
        raise MergeError(differs)
    alpha = cfg.r if cfg.alpha is None else cfg.alpha
    return {"peft_type": method.upper(), "r": cfg.r, "alpha": alpha, "rank_pattern": {}, "alpha_pattern": {}}


def loha_to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> Pair:
    return _fields(cfg, layer, "LoHa"), {theirs: params[ours] for ours, theirs in _HADAMARD.items()}


def loha_from_peft(config: dict[str, Any], tensors: dict[str, Tensor], layer: Any) -> Pair | None:
    if config["peft_type"] != "LOHA":
        return None
    if differs := _differs(layer, "LoHa"):
        raise ConfigError(differs)
    config.get("use_effective_conv2d")  # told by the tensors
    values = {ours: tensors[theirs] for ours, theirs in _HADAMARD.items()}
    for i in (1, 2):
        if (core := tensors.get(f"hada_t{i}")) is not None:  # A over channels, the kernel in a tensor of its own
            core = core.reshape(*values[f"lora_A{i}"].shape[:1], -1, *layer.kernel_size)
            values[f"lora_A{i}"] = torch.einsum("rj...,jc->rc...", core, values[f"lora_A{i}"]).flatten(1)
            values[f"lora_B{i}"] = values[f"lora_B{i}"].mT
    return {"r": config["r"], "alpha": config["alpha"]}, values


def _split(layer: nn.Module, whole: bool) -> str:
    """Which of LoKr's splits PEFT computes; of nn.Conv1d where w2 is whole it is another one."""
    return "swapped" if whole and isinstance(layer, nn.Conv1d) else "channels"


def lokr_to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> Pair:
    fields, wanted = _fields(cfg, layer, "LoKr"), _split(layer, "lora_w2" in params)
    if wanted != ("channels" if cfg.split == "patches" and kernel_of(layer) == 1 else cfg.split):
        raise MergeError(
            f"LoKrConfig(split={cfg.split!r}) on a {type(layer).__name__}: PEFT computes split={wanted!r} there; "
            "merge(model) writes the weights"
        )
    fields |= {"decompose_both": cfg.decompose_both, "decompose_factor": cfg.decompose_factor}
    tensors = {name.replace("lora_", "lokr_"): tensor for name, tensor in params.items()}
    if "lokr_w2" in tensors and isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        tensors["lokr_w2"] = tensors["lokr_w2"].unflatten(1, (-1, *layer.kernel_size))
    return {**fields, "use_effective_conv2d": False}, tensors


def lokr_from_peft(config: dict[str, Any], tensors: dict[str, Tensor], layer: nn.Module) -> Pair | None:
    if config["peft_type"] != "LOKR":
        return None
    if differs := _differs(layer, "LoKr"):
        raise ConfigError(differs)
    for name in ("use_effective_conv2d", "rank_dropout_scale"):  # told by the tensors; of rank_dropout alone
        config.get(name)
    fields = {"r": config["r"], "alpha": config["alpha"]}
    fields |= {"decompose_both": bool(config.get("decompose_both")), "decompose_factor": config["decompose_factor"]}
    values = {f"lora_{name}": tensors[f"lokr_{name}"] for name in _KRONECKER if f"lokr_{name}" in tensors}
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        fields["split"] = _split(layer, "lora_w2" in values)
    if (core := tensors.get("lokr_t2")) is not None:  # the kernel in a tensor of its own, w2_a and w2_b of channels
        core, b = core.unflatten(1, (-1, kernel_of(layer))), values["lora_w2_b"]
        values |= {"lora_w2_a": values["lora_w2_a"].mT, "lora_w2_b": torch.einsum("ijk,jd->idk", core, b).flatten(1)}
    return fields, values
