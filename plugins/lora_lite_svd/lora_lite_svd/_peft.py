"""How PiSSA is read of PEFT's directories, where its factors are those of a base without the principal part."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_lite_core import start_factors

OTHERS = ("kasa_config", "use_dora", "use_qalora", "alora_invocation_tokens")  # what makes another variant of it


def pissa_from_peft(
    config: dict[str, Any], tensors: dict[str, Tensor], layer: nn.Module
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """A and B of a folder; the start is made of the weight again, as PEFT does."""
    if config["peft_type"] != "LORA" or any(config.get(name) for name in OTHERS):
        return None
    if config.get("init_lora_weights") != "pissa":
        return None
    A, B, scale = tensors["lora_A.weight"], tensors["lora_B.weight"], config["lora_alpha"] / config["r"]
    if config.get("use_rslora"):
        scale *= config["r"] ** 0.5
    A0, B0 = start_factors(layer, A, B, scale, by="svd")
    values = {"lora_A0": A0, "lora_B0": B0, "lora_dA": A.to(A0) - A0, "lora_dB": B.to(B0) - B0}
    fields = {"r": len(A), "alpha": scale * len(A)}  # PEFT makes no more factors than the weight has
    return {**fields, "dropout": config.get("lora_dropout") or 0.0}, values
