"""LN-tuning: the weights and biases of a model's norms are trained.

    n(x) ⊙ γ' + β',   γ' = (1 + g) ⊙ γ,   β' = (1 + g) ⊙ β + δ        here   y' = (1 + g) ⊙ y + δ

y is what the frozen norm returns; g (d) and, where the norm has a bias, δ (d) are trained from zero, which makes step 0
the identity. Any norm over the last dimension (LayerNorm, RMSNorm, those with a weight of 1 + w), because only y is
read, and none is computed twice. What the form loses: an entry of γ that is exactly 0 stays 0, and a step is relative
to γ, not absolute. Goes on norms alone, by default on all whose name says so; a norm is no linear layer, so that the
adapter is run and not merged. The config's train_modules trains the norms themselves, beside any other method. Folders
of the peft package go both ways. d or 2 d parameters, as many multiplications and additions per token.

Zhao, Tu, Wei, Mei, Xie: Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning, 2023,
arXiv:2312.11420.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lite_core import AdapterConfig, ParamSpec, TargetError, hookimpl

from . import _peft_gains
from ._gates import gated, shifted

LAYERS = ("block",)
AFFINE = False  # a norm divides by the size of what it gets
BENCH = {"lr": 1e-1}


@dataclass(frozen=True, kw_only=True)
class LNTuningConfig(AdapterConfig):
    """Config of LN-tuning; target_names names norms, all of them where it is left out."""

    variant = "ln_tuning"

    target_names: tuple[str, ...] = (r"(?i)(norm|(^|[._])ln)_?\w*$",)


Config = LNTuningConfig
to_peft, from_peft = hookimpl(_peft_gains.ln_to_peft), hookimpl(_peft_gains.ln_from_peft)


@hookimpl
def param_specs(d_out: int, layer: nn.Module, name: str) -> dict[str, ParamSpec]:
    if isinstance(layer, _peft_gains.OTHER_NORMS) or getattr(layer, "weight", None) is None:
        raise TargetError(
            f"{name} is a {type(layer).__name__}, which has no weight over the last dimension; leave it out with "
            "exclude_names"
        )
    gain = {"lora_g": ParamSpec((d_out,), doc="relative offset of the norm's weight")}
    shift = ParamSpec((d_out,), doc="shift δ")
    return gain if getattr(layer, "bias", None) is None else {**gain, "lora_shift": shift}


@hookimpl
def forward(y: Tensor, params: dict[str, Tensor]) -> Tensor:
    full = torch.promote_types(y.dtype, torch.float32)
    g = params["lora_g"].to(full)
    return shifted(y, g, params["lora_shift"].to(full)) if "lora_shift" in params else gated(y, 1 + g)
