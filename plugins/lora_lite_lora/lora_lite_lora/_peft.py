"""How LoRA is written in PEFT's directories, and read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_lite_core import ConfigError

OTHERS = ("kasa_config", "use_dora", "use_qalora", "alora_invocation_tokens")  # what makes another variant of it

# What PEFT keeps beside the factors and needs in training alone, by the field that asks for it.
OF_TRAINING = {
    "velora_config": ("lora_velora_embed",),
    "monteclora_config": tuple(
        f"lora_monteclora_sampler.{one}"
        for one in ("std_prior", "expert_weights_prior", "gaussian_var_prior", "expert_weights")
    ),
}


def to_peft(params: dict[str, Tensor], cfg: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    alpha = cfg.r if cfg.alpha is None else cfg.alpha
    fields = {"peft_type": "LORA", "r": cfg.r, "lora_alpha": alpha, "use_rslora": cfg.rslora}
    fields["lora_dropout"] = cfg.dropout
    fields |= {"rank_pattern": {}, "alpha_pattern": {}}
    tensors = {"lora_A.weight": params["lora_A"], "lora_B.weight": params["lora_B"]}
    return {**fields, "lora_bias": cfg.bias}, {**tensors, **({"lora_B.bias": params["lora_bias"]} if cfg.bias else {})}


def from_peft(
    config: dict[str, Any], tensors: dict[str, Tensor], name: str, sizes: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    on = [one for one in OTHERS if config.get(one)]
    if on == ["use_qalora"] and _all_inputs(config, tensors, sizes[name]):
        on = []
    if config["peft_type"] != "LORA" or on or isinstance(config.get("init_lora_weights"), str):
        return None
    fields = {"r": config["r"], "alpha": config["lora_alpha"], "rslora": bool(config.get("use_rslora"))}
    fields["dropout"] = config.get("lora_dropout") or 0.0
    for field in [field for field in OF_TRAINING if config.get(field)]:
        for one in OF_TRAINING[field]:
            tensors.get(one)  # it changes no output
    A, B = tensors["lora_A.weight"], tensors["lora_B.weight"]
    if blocks := config.get("use_bdlora"):
        (d_in, d_out), r = sizes[name], fields["r"]
        A, B = _whole("lora_A", A, (r, d_in), blocks), _whole("lora_B", B, (d_out, r), blocks)
    values = {"lora_A": A, "lora_B": B}
    if config.get("lora_bias"):
        fields["bias"], values["lora_bias"] = True, tensors["lora_B.bias"]
    return fields, values


def _whole(name: str, factor: Tensor, shape: tuple[int, int], blocks: Any) -> Tensor:
    """A factor that is kept as it is, or as the blocks of its diagonal, one below the other."""
    if tuple(factor.shape) == shape:
        return factor
    number = blocks.get("nblocks") if isinstance(blocks, dict) else None
    if not isinstance(number, int) or number < 1 or any(size % number for size in shape):
        raise ConfigError(f"use_bdlora={blocks!r}: nblocks is a whole number that divides {shape[0]} and {shape[1]}")
    if tuple(factor.shape) != (shape[0], shape[1] // number):
        raise ConfigError(
            f"{name} is {tuple(factor.shape)}; with nblocks={number} it is {shape} or {(shape[0], shape[1] // number)}"
        )
    return torch.block_diag(*factor.chunk(number))


def _all_inputs(config: dict[str, Any], tensors: dict[str, Tensor], sizes: tuple[int, int]) -> bool:
    """Whether A reads single inputs: on layers that are not GPTQ's PEFT makes a LoRA for use_qalora, too."""
    A = tensors.get("lora_A.weight")
    return config.get("qalora_group_size") != 1 and A is not None and A.shape[-1:] == sizes[:1]
