"""The same as `_peft`, for Uni-LoRA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lite_core import ConfigError

from ._peft import Pair, Sizes, full, linear_only

THETA = "base_model.unilora_theta_d"
C = "base_model.unilora_c"  # for us alone: a layer's own factors are those of the numbers that it uses


def uni_lora_to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> Pair:
    """With places and factors, which PEFT draws in an order of its own where they are not in the file."""
    linear_only(layer, "Uni-LoRA")
    own: dict[str, Tensor] = {}
    for side in "AB":
        places = params[f"lora_I_{side}"].long()
        own |= {f"unilora_indices_{side}": places, f"unilora_scales_{side}": params["lora_c"][places]}
    fields = {"peft_type": "UNILORA", "r": cfg.r, "theta_d_length": cfg.length, "proj_seed": 42, "save_indices": True}
    return fields, {**own, THETA: params["lora_theta"], C: params["lora_c"]}


def uni_lora_from_peft(config: dict[str, Any], tensors: dict[str, Tensor], name: str, sizes: Sizes) -> Pair:
    """PEFT draws all places of all layers together, by proj_seed, and counts them; they are not in its file, but where
    save_indices says so."""
    r, length, seed = int(config["r"]), int(config["theta_d_length"]), int(config["proj_seed"])
    config.get("init_theta_d_bound")  # where training began
    theta = tensors[THETA]
    total = sum(r * (d_in + d_out) for d_in, d_out in sizes.values())
    drawn = _drawn(total, length, seed)
    c = torch.bincount(drawn, minlength=length).to(torch.float32).clamp_min(1).rsqrt()
    before = list(sizes)[: list(sizes).index(name)]
    start = sum(r * sum(sizes[one]) for one in before)
    d_in, d_out = sizes[name]
    A, B = drawn[start : start + r * (d_in + d_out)].split([r * d_in, r * d_out])
    A, B = A.view(r, d_in), B.view(d_out, r)
    if config.get("save_indices"):
        A, B = tensors["unilora_indices_A"], tensors["unilora_indices_B"]
        for side, places in (("A", A), ("B", B)):
            if int(places.max()) >= length or int(places.min()) < 0:
                raise ConfigError(f"unilora_indices_{side} names number {int(places.max())} of theta_d_length={length}")
            c = c.scatter(0, places.flatten().long(), full(tensors[f"unilora_scales_{side}"]).flatten().float())
    c = tensors.get(C, c)
    whole = torch.int16 if length < 2**15 else torch.int32
    values = {"lora_theta": theta, "lora_c": c, "lora_I_A": A.to(whole), "lora_I_B": B.to(whole)}
    return {"r": r, "length": length}, values


def _drawn(total: int, length: int, seed: int) -> Tensor:
    try:
        import numpy
    except ImportError as error:
        raise ConfigError("the places are not in the file: PEFT draws them by numpy, which is not installed") from error
    draws = numpy.random.default_rng(seed)
    places = numpy.repeat(numpy.arange(length), total // length)
    if rest := total % length:
        places = numpy.concatenate([places, draws.choice(length, size=rest, replace=False)])
    draws.shuffle(places)
    return torch.as_tensor(places, dtype=torch.int64)
