"""What the methods of this package have in common in PEFT's folders: projections that are kept once for all layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite_core import ConfigError, MergeError, Target

Pair = tuple[dict[str, Any], dict[str, Tensor]]
Sizes = Mapping[str, tuple[int, int]]


def full(tensor: Tensor) -> Tensor:
    """At least float32: 1 + g would round a small g away in bfloat16."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def linear_only(layer: nn.Module, method: str, *others: str) -> None:
    if not isinstance(layer, nn.Linear) and type(layer).__name__ not in others:
        raise MergeError(f"PEFT's {method} takes nn.Linear layers, not a {type(layer).__name__}")


def widest(sizes: Sizes) -> tuple[int, int]:
    """The largest d_in and the largest d_out, which need not be those of one layer."""
    return max(d_in for d_in, _ in sizes.values()), max(d_out for _, d_out in sizes.values())


def pair_of(config: dict[str, Any], tensors: dict[str, Tensor], method: str, rows: int, sizes: Sizes) -> list[Tensor]:
    """PEFT's A (rows, largest d_in) and B (largest d_out, r), from the file or drawn anew by its key, as PEFT does."""
    key = config.get("projection_prng_key") or 0
    if config.get("save_projection", True):
        return [tensors[f"base_model.{method}_{side}"] for side in "AB"]
    generator = torch.Generator("cpu").manual_seed(int(key))
    d_in, d_out = widest(sizes)
    shapes = ((rows, d_in), (d_out, int(config["r"])))
    return [torch.empty(s).uniform_(-((6 / s[1]) ** 0.5), (6 / s[1]) ** 0.5, generator=generator) for s in shapes]


def vera_to_peft(method: str, params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> Pair:
    """Of VeRA and PVeRA, which PEFT writes alike."""
    linear_only(layer, type(cfg).__name__.removesuffix("Config"))
    fields = {"peft_type": method.upper(), "r": cfg.r, "d_initial": cfg.d0, "save_projection": True, "bias": "none"}
    own = {f"{method}_lambda_d": cfg.d0 + full(params["lora_d"]), f"{method}_lambda_b": params["lora_b"]}
    return fields, {**own, **{f"base_model.{method}_{side}": params[f"lora_{side}"] for side in "AB"}}


def vera_from_peft(
    method: str, config: dict[str, Any], tensors: dict[str, Tensor], name: str, sizes: Sizes
) -> Pair | None:
    if config["peft_type"] != method.upper():
        return None
    d = full(tensors[f"{method}_lambda_d"])
    A, B = pair_of(config, tensors, method, len(d), sizes)
    d0 = config["d_initial"] or 0.1  # where PEFT has started; any number will do
    (d_in, d_out), fields = sizes[name], {"r": config["r"], "d0": d0, "corners": True}
    values = {"lora_d": d - d0, "lora_b": tensors[f"{method}_lambda_b"]}
    return fields, {**values, "lora_A": A[:, :d_in], "lora_B": B[:d_out]}


def vb_lora_from_peft(config: dict[str, Any], tensors: dict[str, Tensor]) -> Pair:
    """Logits, or what PEFT keeps of them for inference: which K are the largest, and the shares of all but the last of
    them. Logits that give these shares take their place; the others are so small that training goes on with the K."""
    bank = tensors["base_model.vblora_vector_bank"]
    for name in ("init_vector_bank_bound", "init_logits_std"):
        config.get(name)  # where training began
    values = {"lora_bank": bank}
    for side in "AB":
        name = f"vblora_logits_{side}"
        if not config.get("save_only_topk_weights"):
            values[f"lora_logits_{side}"] = tensors[name]
            continue
        shares, which = full(tensors[f"{name}_topk_weights"]), tensors[f"{name}_topk_indices"].long()
        shares = torch.cat([shares, 1 - shares.sum(-1, keepdim=True)], -1).clamp_min(1e-30)
        if int(which.max()) >= len(bank) or int(which.min()) < 0:
            raise ConfigError(f"{name}_topk_indices chooses vector {int(which.max())} of {len(bank)}")
        logits = shares.new_full((*which.shape[:-1], len(bank)), -1e4)
        values[f"lora_logits_{side}"] = logits.scatter(-1, which, shares.log())
    fields = {name: config[name] for name in ("r", "num_vectors", "vector_length", "topk")}
    return fields, values


def fill_corners(targets: Sequence[Target], names: Sequence[str]) -> None:
    """Make each of these shared tensors the first rows and columns of the largest one, as PEFT takes them."""
    for name in names:
        tensors = [target.params[name] for target in targets]
        largest = max(tensors, key=Tensor.numel)
        for tensor in tensors:
            part = largest[tuple(slice(size) for size in tensor.shape)]
            if part.shape != tensor.shape:
                raise ConfigError(
                    f"corners=True: {name} is {tuple(tensor.shape)} for one layer and {tuple(largest.shape)} for "
                    "another, and neither is a corner of the other; adapt them as two adapters"
                )
            if tensor is not largest:
                tensor.copy_(part)
