"""How DEFT is written in PEFT's directories, and read: P and R themselves, not their offsets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lite_core import ConfigError, MergeError, dense_weight

Pair = tuple[dict[str, Any], dict[str, Tensor]]


def factors(P: Tensor, decomposition: str) -> tuple[Tensor, Tensor]:
    """Q and Z of the projector Q Zᵀ."""
    if decomposition == "relu":
        return P, torch.relu(P)
    Q, T = torch.linalg.qr(P)
    Q = Q * T.diagonal().sign()  # or its signs were the library's, and jumped
    return Q, Q


def _signs(P: Tensor, decomposition: str) -> Tensor:
    """(r, 1), of the rows of PEFT's R, whose Q has the library's signs."""
    return P.new_ones(()) if decomposition == "relu" else torch.linalg.qr(P).R.diagonal().sign()[:, None]


def _taken_out(P: Tensor, decomposition: str, layer: nn.Module) -> Tensor:
    """Zᵀ W."""
    weight = dense_weight(layer)
    return factors(P.to(weight.device), decomposition)[1].T @ weight.to(P.dtype)


def _full(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> Pair:
    if isinstance(layer, (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise MergeError(f"PEFT's DEFT takes linear layers, not a {type(layer).__name__}")
    P0, dP, dR = (_full(params[name]) for name in ("lora_P0", "lora_dP", "lora_dR"))
    fields = {
        "peft_type": "DEFT",
        "r": cfg.r,
        "alpha": cfg.alpha,
        "decomposition_method": cfg.decomposition,
        "deft_dropout": cfg.dropout,
        "para": False,
        "init_weights": True,
        "bias": "none",
    }
    R = _taken_out(P0, cfg.decomposition, layer) / cfg.scale + dR
    return fields, {"deft_P": P0 + dP, "deft_R": _signs(P0 + dP, cfg.decomposition) * R}


def from_peft(config: dict[str, Any], tensors: dict[str, Tensor], layer: nn.Module) -> Pair | None:
    if config["peft_type"] != "DEFT":
        return None
    if config.get("para"):
        raise ConfigError("para=True takes a part of the weight out and puts nothing in: this variant has both parts")
    if config.get("bias") not in (None, "none"):
        raise ConfigError(f"bias={config['bias']!r} is not what this variant computes")
    for name in ("init_weights", "init_scale"):
        config.get(name)  # how R started
    P, R = _full(tensors["deft_P"]), _full(tensors["deft_R"])
    r, decomposition = min(config["r"], len(P)), config.get("decomposition_method", "relu")  # PEFT cuts it to d_out
    alpha = config.get("alpha") or None
    offset = _signs(P, decomposition).to(R.device) * R - _taken_out(P, decomposition, layer).to(R.device) / (
        (alpha or r) / r
    )
    fields = {"r": r, "alpha": alpha, "decomposition": decomposition, "dropout": config.get("deft_dropout") or 0.0}
    return fields, {"lora_P0": P, "lora_dP": torch.zeros_like(P), "lora_dR": offset}
