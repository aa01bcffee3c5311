"""The same as `_peft`, for RandLoRA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lite_core import ConfigError

from ._peft import Pair, Sizes, full, linear_only, widest


def randlora_to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module, name: str, sizes: Sizes) -> Pair:
    """PEFT's pair is of min and max of the largest d_in and d_out, which no layer may have: filled up with zeros."""
    linear_only(layer, "RandLoRA")
    A, B = params["lora_A"], params["lora_B"]
    small, large = sorted(widest(sizes))
    largest = all(min(sizes[name]) >= min(one) and max(sizes[name]) >= max(one) for one in sizes.values())
    if largest:
        A = F.pad(A, (0, small - A.shape[1]))
        B = F.pad(B, (0, 0, 0, -(-small // cfg.r) - B.shape[1], 0, large - B.shape[0]))
    fields = {"peft_type": "RANDLORA", "r": cfg.r, "randlora_alpha": cfg.r if cfg.alpha is None else cfg.alpha}
    more = {"save_projection": True, "sparse": cfg.sparse, "bias": "none"}
    gamma = full(params["lora_g"]) + 1 / params["lora_g"].shape[1]
    own = {"randlora_lambda": params["lora_l"], "randlora_gamma": gamma}
    return {**fields, **more}, {**own, "base_model.randlora_A": A[:, None], "base_model.randlora_B": B}


def randlora_from_peft(config: dict[str, Any], tensors: dict[str, Tensor], size: tuple[int, int]) -> Pair:
    for name in ("projection_prng_key", "very_sparse"):
        config.get(name)  # how the bases were drawn, which are in the file
    if not config.get("save_projection", True):
        raise ConfigError(
            "save_projection=False: PEFT draws the bases anew, in a number format that depends on the machine; save "
            "the adapter with save_projection=True"
        )
    l, gamma = tensors["randlora_lambda"], full(tensors["randlora_gamma"])
    n, (m, M) = l.shape[-1], sorted(size)
    alpha = config["randlora_alpha"]
    fields = {"r": config["r"], "alpha": alpha, "sparse": bool(config.get("sparse")), "corners": True}
    A, B = tensors["base_model.randlora_A"], tensors["base_model.randlora_B"]
    for side, common in (("A", A), ("B", B)):  # PEFT writes them once more for each layer
        if (copy := tensors.get(f"randlora_{side}")) is not None and not torch.equal(copy, common):
            raise ConfigError(f"randlora_{side} of this layer is not base_model.randlora_{side}, and RandLoRA has one")
    return fields, {"lora_A": A[:, 0, :m], "lora_B": B[:M, :n], "lora_l": l, "lora_g": gamma - 1 / m}
