"""How OSF is written in PEFT's directories, and read: U, S and V themselves. PEFT makes their starts anew at load."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lite_core import ConfigError, MergeError

from ._lower_triplets import lower_triplets

Pair = tuple[dict[str, Any], dict[str, Tensor]]
NAMES = {"U": "osf_svd_params.U_low", "S": "osf_svd_params.S_low", "V": "osf_svd_params.V_low"}
FAR = 1e-3  # how far the part that is trained may be from PEFT's at the start, as a share of it


def _full(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> Pair:
    if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point():
        raise MergeError(f"PEFT's OSF takes linear layers with a dense weight, not this {type(layer).__name__}")
    start = {key: _full(params[f"lora_{key}0"]) for key in NAMES}
    U, S, Vh = torch.linalg.svd(layer.weight.detach().float(), full_matrices=False)
    k = len(S) - len(start["S"])
    theirs, ours = (U[:, k:] * S[k:]) @ Vh[k:], (start["U"] * start["S"]) @ start["V"]
    if not float((theirs.to(ours) - ours).norm()) <= FAR * float(ours.norm()):
        raise MergeError(
            "PEFT makes the start of OSF anew from the weight, and its smaller singular triplets are not these: "
            "singular values on both sides of the cut are equal; merge(model) writes the change into the weights"
        )
    fields = {"peft_type": "OSF", "effective_rank": cfg.keep if cfg.keep < 1 else int(cfg.keep), "init_weights": True}
    return fields, {NAMES[key]: start[key] + _full(params[f"lora_d{key}"]) for key in NAMES}


def from_peft(config: dict[str, Any], tensors: dict[str, Tensor], layer: nn.Module) -> Pair | None:
    if config["peft_type"] != "OSF":
        return None
    config.get("rank_pattern")  # the shapes tell
    config.get("target_svd_config")  # PEFT does not look at it
    given = {key: _full(tensors[name]) for key, name in NAMES.items()}
    n = len(given["S"])
    values = {name: _full(t).to(given["S"].device) for name, t in lower_triplets(layer, n, torch.Generator()).items()}
    for key, tensor in given.items():
        if tensor.shape != values[f"lora_{key}0"].shape:
            raise ConfigError(f"{NAMES[key]} is {tuple(tensor.shape)}, not {tuple(values[f'lora_{key}0'].shape)}")
    U0, S0, V0 = (values[f"lora_{key}0"] for key in NAMES)
    signs = torch.where((U0 * given["U"]).sum(0) + (V0 * given["V"]).sum(1) < 0, -1.0, 1.0).to(U0)  # theirs to ours
    values |= {"lora_dU": given["U"] * signs - U0, "lora_dS": given["S"] - S0}
    share, m = config.get("effective_rank"), min(len(U0), V0.shape[1])
    share = 0.5 if share is None else share
    as_told = isinstance(share, float) and 0 < share < 1 and int(m * share) == m - n
    return {"keep": share if as_told else m - n}, values | {"lora_dV": given["V"] * signs[:, None] - V0}
