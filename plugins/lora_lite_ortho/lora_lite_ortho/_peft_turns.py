"""The same as `_peft`, for the two methods that rotate blocks."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from lora_lite_core import ConfigError, UnsupportedLayer, dense_weight

from ._peft import CONVOLUTIONS, Pair, full, linear_only


def _of_pixels(layer: nn.Module) -> bool:
    """Whether a convolution's patches are single pixels, which do not overlap."""
    return isinstance(layer, nn.Conv2d) and max(layer.kernel_size) == 1


def oft_to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> Pair:
    if not _of_pixels(layer):
        linear_only(layer, "OFT")
    q = full(params["lora_q"])
    fields = {"peft_type": "OFT", "r": 0, "oft_block_size": cfg.block_size, "bias": "none"}
    fields |= {"coft": cfg.coft, "eps": cfg.eps, "block_share": cfg.block_share}
    if cfg.terms is None:
        return {**fields, "use_cayley_neumann": False}, {"oft_R.weight": q}
    series = {"use_cayley_neumann": True, "num_cayley_neumann_terms": cfg.terms, "peft_version": "0.18.0"}
    return {**fields, **series}, {"oft_R.weight": -q}


def oft_from_peft(config: dict[str, Any], tensors: dict[str, Tensor], layer: nn.Module) -> Pair | None:
    if config["peft_type"] != "OFT":
        return None
    if isinstance(layer, nn.Embedding):
        raise ConfigError("PEFT turns the table of an embedding, and this variant what is read")
    if isinstance(layer, CONVOLUTIONS) and not _of_pixels(layer):
        raise UnsupportedLayer(
            f"of a {type(layer).__name__} PEFT adds turned patches up where they overlap, and not when it merges: no "
            "variant computes that; run it with PEFT, or train on linear layers and kernels of one pixel"
        )
    coft, shared, terms = bool(config.get("coft")), bool(config.get("block_share")), _terms(config)
    q = tensors["oft_R.weight"]
    count, pairs = q.shape  # pairs = b (b − 1) / 2
    b = round((1 + (1 + 8 * pairs) ** 0.5) / 2)
    r, size = config.get("r") or 0, config.get("oft_block_size") or 0
    d_in = dense_weight(layer).shape[1] if shared else count * b
    # What does not divide d_in PEFT replaces by a neighbour that does.
    if (size and b != size and d_in % size == 0) or (r and not size and d_in != r * b and d_in % r == 0):
        raise ConfigError(f"oft_R.weight holds {count} blocks of {b}, but r={r} and oft_block_size={size}")
    eps = config.get("eps", 6e-5)
    fields = {"block_size": b, "block_share": shared, "coft": coft, "terms": terms}
    return {**fields, **({"eps": eps} if coft else {})}, {"lora_q": q if terms is None else -q}


def _terms(config: dict[str, Any]) -> int | None:
    """The truncated series turns the other way than the exact mode. Before version 0.18 it was another polynomial."""
    terms = config.get("num_cayley_neumann_terms", 5)
    if not config.get("use_cayley_neumann", True):
        return None
    made = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version")))
    if made is None or (int(made[1]), int(made[2])) < (0, 18):
        raise ConfigError(
            f"use_cayley_neumann=True with peft_version={config.get('peft_version')!r}: PEFT's series was another one "
            "before 0.18.0"
        )
    return terms


def road_to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Linear) -> Pair:
    linear_only(layer, "RoAd")
    group = cfg.group_size or next(size for size in range(64, 0, -2) if layer.out_features % size == 0)
    fields = {"peft_type": "ROAD", "variant": f"road_{cfg.mode}", "group_size": group}
    return fields, {"road_theta": params["lora_theta"], "road_alpha": 1 + full(params["lora_alpha"])}


def road_from_peft(config: dict[str, Any], tensors: dict[str, Tensor]) -> Pair | None:
    if config["peft_type"] != "ROAD":
        return None
    modes = {"road_1": 1, "road_2": 2, "road_4": 4}
    if config["variant"] not in modes:
        raise ConfigError(f"variant={config['variant']!r}: RoAd has {', '.join(modes)}")
    fields = {"mode": modes[config["variant"]], "group_size": config["group_size"]}
    return fields, {"lora_theta": tensors["road_theta"], "lora_alpha": full(tensors["road_alpha"]) - 1}
