"""The same as `_peft`, for TinyLoRA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lite_core import ConfigError

from ._peft import Pair, Sizes, linear_only

V = "base_model.tinylora_v."  # and the number of the group of layers


def tinylora_to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module, name: str, sizes: Sizes) -> Pair:
    linear_only(layer, "TinyLoRA", "Conv1D")
    number = list(sizes).index(name)
    fields = {"peft_type": "TINYLORA", "r": cfg.r, "u": cfg.u, "weight_tying": float(cfg.tied), "bias": "none"}
    own = {f"tinylora_{side}": params[f"lora_{side}"] for side in "ABP"}
    return {**fields, "save_projection": True}, {**own, f"{V}{0 if cfg.tied else number}": params["lora_v"]}


def tinylora_from_peft(
    config: dict[str, Any], tensors: dict[str, Tensor], layer: nn.Module, name: str, sizes: Sizes
) -> Pair | None:
    """PEFT numbers layers in the model's order, and ties neighbours to each other: here all are tied, or none."""
    if config["peft_type"] != "TINYLORA":
        return None
    number, layers = list(sizes).index(name), len(sizes)
    u, tying = int(config["u"]), float(config["weight_tying"])
    for field in ("projection_seed", "init_v_bound"):
        config.get(field)  # how P was drawn, and where training began
    vectors = [tensors[key] for key in list(tensors) if key.startswith(V)]
    groups = max(1, round(layers * (1 - tying)))
    if groups not in (1, layers) or len(vectors) > groups:
        raise ConfigError(
            f"weight_tying={tying} has {groups} vectors for {layers} layers, and the file {len(vectors)}; here all "
            "layers have one together (1.0) or one each (0.0)"
        )
    A, B = tensors["tinylora_A"], tensors["tinylora_B"]
    r = min(int(config["r"]), *sizes[name])  # PEFT takes no more than there are
    if config.get("save_projection", True):
        P = tensors["tinylora_P"]
    else:
        draws = torch.Generator("cpu").manual_seed(int(config["projection_seed"]) + number)
        P = torch.normal(0.0, r**-0.5, (u, r, r), generator=draws)
    if isinstance(layer, nn.Embedding):  # whose table PEFT takes as it is stored, transposed
        A, B, P = B.mT, A.mT, P.mT
    values = {"lora_A": A, "lora_B": B, "lora_P": P, "lora_v": tensors[f"{V}{0 if groups == 1 else number}"]}
    return {"r": r, "u": u, "tied": groups == 1 and layers > 1}, values
