"""The same as `_peft`, for IA3's gates of outputs and of inputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_lite_core import ConfigError, MergeError

from ._peft import CONVOLUTIONS, Pair, full


def _written(g: Tensor, layer: nn.Module, inputs: bool) -> dict[str, Tensor]:
    """Gates of outputs are (d_out, 1) in PEFT, those of inputs (1, d_in), both of a convolution (1, channels, 1 …)."""
    if isinstance(layer, nn.Conv1d):
        raise MergeError("PEFT's IA3 takes no Conv1d; merge(model) writes the weights")
    across = [1 for _ in layer.kernel_size] if isinstance(layer, CONVOLUTIONS) else []
    return {"ia3_l": (1 + full(g)).view(1, -1, *across) if inputs or across else 1 + full(g)[:, None]}


def ia3_to_peft(params: dict[str, Tensor], layer: nn.Module) -> Pair:
    return {"peft_type": "IA3", "feedforward_modules": []}, _written(params["lora_g"], layer, inputs=False)


def ia3_ff_to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> Pair:
    if isinstance(layer, CONVOLUTIONS) and not cfg.channels and max(layer.kernel_size) > 1:
        raise MergeError(
            f"IA3FFConfig(channels=False) on a {type(layer).__name__} gates each entry of a patch, and PEFT the "
            "channels, as channels=True does; merge(model) writes the weights"
        )
    fields = {"peft_type": "IA3", "feedforward_modules": "$target_modules"}
    return fields, _written(params["lora_g"], layer, inputs=True)


def _read(
    config: dict[str, Any], tensors: dict[str, Tensor], layer: nn.Module, inputs: bool
) -> dict[str, Tensor] | None:
    if config["peft_type"] != "IA3" or bool(config.get("feedforward_modules")) is not inputs:
        return None
    gate = tensors["ia3_l"]
    one = 0 if inputs or isinstance(layer, CONVOLUTIONS) else 1
    if gate.dim() != 2 or gate.shape[one] != 1:
        raise ConfigError(f"ia3_l has the shape {tuple(gate.shape)}; feedforward_modules says {inputs} of this module")
    return {"lora_g": full(gate).flatten() - 1}


def ia3_from_peft(config: dict[str, Any], tensors: dict[str, Tensor], layer: nn.Module) -> Pair | None:
    values = _read(config, tensors, layer, inputs=False)
    return None if values is None else ({}, values)


def ia3_ff_from_peft(config: dict[str, Any], tensors: dict[str, Tensor], layer: nn.Module) -> Pair | None:
    values = _read(config, tensors, layer, inputs=True)
    return None if values is None else ({"channels": True} if isinstance(layer, CONVOLUTIONS) else {}, values)
