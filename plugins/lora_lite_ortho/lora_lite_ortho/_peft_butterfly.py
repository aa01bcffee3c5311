"""The same as `_peft`, for BOFT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lite_core import ConfigError, skew

from ._peft import Pair, full, of_images, read_of_images


def boft_to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> Pair:
    of_images(layer, "BOFT")
    q, s = full(params["lora_q"]), full(params["lora_s"])
    b = round((1 + (1 + 8 * q.shape[1]) ** 0.5) / 2)
    fields = {"peft_type": "BOFT", "boft_n_butterfly_factor": cfg.factors, "bias": "none"}
    fields |= {"boft_block_size": 0 if cfg.block_num else b, "boft_block_num": cfg.block_num or 0}
    scale = 1 + (s[None] if isinstance(layer, nn.Conv2d) else s[:, None])
    return fields, {"boft_R": skew(q, b).unflatten(0, (cfg.factors, -1)), "boft_s": scale}


def boft_from_peft(config: dict[str, Any], tensors: dict[str, Tensor], layer: nn.Module) -> Pair | None:
    if config["peft_type"] != "BOFT":
        return None
    read_of_images(layer, "BOFT")
    R, s = full(tensors["boft_R"]), full(tensors["boft_s"])
    if isinstance(layer, nn.Conv2d):  # a factor in each row, n b b = d_in b numbers
        b = R.shape[1] // layer.weight[0].numel()
        R = R.unflatten(1, (-1, b, b))
    factors, count, b, _ = R.shape
    wanted = config["boft_n_butterfly_factor"]
    if factors not in (wanted, 1):  # 1: PEFT without its extension makes one, whatever the config says
        raise ConfigError(f"boft_R holds {factors} factors, but boft_n_butterfly_factor={wanted}")
    size, number = config.get("boft_block_size") or 0, config.get("boft_block_num") or 0
    if b != (size or b) or count != (number or count):
        raise ConfigError(f"boft_R holds {count} blocks of {b}, but boft_block_size={size} and boft_block_num={number}")
    rows, columns = torch.triu_indices(b, b, 1)
    q = (R - R.mT)[..., rows, columns].flatten(0, 1) / 2
    blocks = {"block_num": number} if number else {"block_size": b}
    return {**blocks, "factors": factors}, {"lora_q": q, "lora_s": s.flatten() - 1}
