"""The same as `_peft`, for the two methods that know norms of the base."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lite_core import ConfigError, MergeError, dense_weight, start_factors

from ._peft import Pair, full, linear_only, refuse

STARTS = {"pissa": "svd", "olora": "qr"}  # of what PEFT makes A0 and B0, and takes them out of the weight


def _norms(layer: nn.Module, dim: int) -> Tensor:
    return torch.linalg.vector_norm(full(dense_weight(layer)), dim=dim)


def dora_to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> Pair:
    fields = {
        "peft_type": "LORA",
        "use_dora": True,
        "r": cfg.r,
        "lora_alpha": cfg.r if cfg.alpha is None else cfg.alpha,
        "lora_dropout": cfg.dropout,
    }
    magnitude = _norms(layer, 1) * (1 + full(params["lora_m"]))
    factors = {"lora_A.weight": params["lora_A"], "lora_B.weight": params["lora_B"]}
    return {**fields, "rank_pattern": {}, "alpha_pattern": {}}, {**factors, "lora_magnitude_vector": magnitude}


def dora_from_peft(config: dict[str, Any], tensors: dict[str, Tensor], layer: nn.Module) -> Pair | None:
    if config["peft_type"] != "LORA" or not config.get("use_dora"):
        return None
    refuse(config, "lora_bias", "use_qalora")
    alpha = config["lora_alpha"] * (config["r"] ** 0.5 if config.get("use_rslora") else 1)
    norms = _norms(layer, 1)
    if not norms.all():
        raise ConfigError("a row of the base's weight is zero, and has no magnitude that could be scaled")
    if (magnitude := tensors["lora_magnitude_vector"]).shape != norms.shape:
        raise ConfigError(f"lora_magnitude_vector has the shape {tuple(magnitude.shape)}, not {tuple(norms.shape)}")
    m = magnitude.to(norms) / norms - 1
    A, B, r = tensors["lora_A.weight"], tensors["lora_B.weight"], config["r"]
    if by := STARTS.get(str(config.get("init_lora_weights"))):
        # s B0 A0 is out of the weight: the direction is W + s (B A − B0 A0), of rank 2r
        A0, B0 = start_factors(layer, A, B, alpha / r, by=by)
        alpha *= 2 * len(A) / r
        A, B, r = torch.cat([A.to(A0), A0]), torch.cat([B.to(B0), -B0], 1), 2 * len(A)
    return {"r": r, "alpha": alpha, "dropout": config.get("lora_dropout") or 0.0}, {
        "lora_A": A,
        "lora_B": B,
        "lora_m": m,
    }


def delora_to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> Pair:
    linear_only(layer, "DeLoRA")
    if cfg.frozen_copy:
        raise MergeError("PEFT's DeLoRA has no frozen copies (frozen_copy=True); export_lora writes it as a LoRA")
    fields = {"peft_type": "DELORA", "r": cfg.r, "delora_lambda": cfg.lambda0, "rank_pattern": {}, "bias": "none"}
    factors = {"delora_A": params["lora_A"], "delora_B": params["lora_B"], "delora_w_norm": params["lora_w"]}
    return fields, {**factors, "delora_lambda": cfg.lambda0 + full(params["lora_lambda"])}


def delora_from_peft(config: dict[str, Any], tensors: dict[str, Tensor], layer: nn.Module) -> Pair | None:
    if config["peft_type"] != "DELORA":
        return None
    norms, here = full(tensors["delora_w_norm"]), _norms(layer, 0)
    if norms.shape != here.shape or not (norms.to(here) - here).norm() <= 0.01 * here.norm():
        raise ConfigError("delora_w_norm does not hold the norms of this layer's columns: it belongs to another base")
    fields = {"r": config["r"], "lambda0": float(config["delora_lambda"]), "frozen_copy": False}
    values = {"lora_A": tensors["delora_A"], "lora_B": tensors["delora_B"]}
    return fields, {**values, "lora_lambda": full(tensors["delora_lambda"]).flatten() - fields["lambda0"]}
