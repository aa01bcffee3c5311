"""bitsandbytes 4-bit layers on processors with AVX512-BF16: their first evaluation rearranges the weight in place.

A rearranged layer has no gradient and dequantises to garbage, without a word. The flag that asks for it is turned off
while adapters are on the model; a layer that is rearranged already is put back.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from ..contract.errors import ModelStateError

FLAG = "support_avx512bf16_for_cpu"


def prepare(model: nn.Module) -> int:
    """Keep 4-bit layers as they are from now on, for good; call it before a baseline is evaluated. Their number.

    Only bitsandbytes 4-bit layers on processors with AVX512-BF16 need it, and `attach` does it, too: what it cannot put
    back exactly is the second rounding (to bfloat16) of the block scales that an earlier evaluation has done. Raises
    ModelStateError as `attach` does.
    """
    return len(keep_unpacked(model))


def keep_unpacked(model: nn.Module) -> list[str]:
    """Turn the flag off where it is on, put rearranged weights back; the names of the layers that had the flag."""
    turned_off: list[str] = []
    for name, layer in model.named_modules():
        if type(layer).__name__ != "Linear4bit":
            continue
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            _put_back(name, layer)
        if getattr(layer, FLAG, False):
            setattr(layer, FLAG, False)
            turned_off.append(name)
    return turned_off


def let_pack(model: nn.Module, names: list[str]) -> None:
    """Turn the flag on again, on those that are still there."""
    layers = dict(model.named_modules())
    for name in names:
        if hasattr(layers.get(name), FLAG):
            setattr(layers[name], FLAG, True)


def _put_back(name: str, layer: nn.Module) -> None:
    """The codes are permuted back bit for bit; the scales stay as the evaluation has rounded them."""
    weight: Any = layer.weight
    try:
        functional = importlib.import_module("bitsandbytes.functional")
        state = weight.quant_state
        scales = state.absmax.T.reshape(-1).float()
        state.original_nested = False  # its own way back would quantise the scales again
        codes, state = functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
        state.absmax, state.nested = scales, False
        packed, _ = functional._convert_weight_packed_for_cpu(codes, _copy(state))
        exact = torch.equal(packed, weight.data)
    except (ImportError, AttributeError, AssertionError, RuntimeError) as error:
        raise _refusal(name) from error
    if not exact:
        raise _refusal(name)
    weight.data, weight.quant_state = codes, state
    layer.quant_state = state  # type: ignore[assignment]


def _copy(state: Any) -> Any:
    twin = object.__new__(type(state))
    vars(twin).update(vars(state))
    return twin


def _refusal(name: str) -> ModelStateError:
    return ModelStateError(
        f"{name} (bitsandbytes 4-bit) was rearranged for AVX512-BF16 by an earlier evaluation and cannot be put back: "
        "its gradients would be wrong; load the model again and call ll.prepare(model) before the first forward"
    )
