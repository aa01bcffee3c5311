"""The same as `_peft`, for the two methods that rotate blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_lite_core import ConfigError

from ._peft import Pair, full, linear_only, refuse


def oft_to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> Pair:
    linear_only(layer, "OFT")
    fields = {"peft_type": "OFT", "r": 0, "oft_block_size": cfg.block_size, "use_cayley_neumann": False, "bias": "none"}
    return fields, {"oft_R.weight": params["lora_q"]}


def oft_from_peft(config: dict[str, Any], tensors: dict[str, Tensor]) -> Pair | None:
    if config["peft_type"] != "OFT":
        return None
    if config.get("use_cayley_neumann", True):
        raise ConfigError("use_cayley_neumann=True is a truncated series; this variant turns exactly, as False does")
    refuse(config, "coft", "block_share", "bias")
    for name in ("eps", "num_cayley_neumann_terms"):
        config.get(name)  # of coft, and of the series
    count, pairs = tensors["oft_R.weight"].shape  # pairs = b (b − 1) / 2
    b = round((1 + (1 + 8 * pairs) ** 0.5) / 2)
    r, size = config.get("r") or 0, config.get("oft_block_size") or 0
    # What does not divide d_in PEFT replaces by a neighbour that does.
    if (size and b != size and count * b % size == 0) or (r and not size and count != r and count * b % r == 0):
        raise ConfigError(f"oft_R.weight holds {count} blocks of {b}, but r={r} and oft_block_size={size}")
    return {"block_size": b}, {"lora_q": tensors["oft_R.weight"]}


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
