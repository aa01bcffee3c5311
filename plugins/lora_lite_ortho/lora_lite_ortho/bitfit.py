"""BitFit: the bias of a layer is trained, and nothing else.

    y = W x + b + β

β (d_out) is trained from zero, the offset of the bias; so step 0 is the identity. A layer without a bias gets one
(merging adds it to the layer). Needs nothing of the base. d_out parameters and additions per token. BEFT is the same on
the layers that compute values, target_names=("v_proj",). Biases of norms are trained by `ln_tuning`.

Ben Zaken, Ravfogel, Goldberg: BitFit, 2021 (ACL 2022), arXiv:2106.10199. BEFT: arXiv:2509.15974.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lora_lite_core import AdapterConfig, ParamSpec, hookimpl

from . import _peft

BENCH = {"lr": 3e-2}


@dataclass(frozen=True, kw_only=True)
class BitFitConfig(AdapterConfig):
    """Config of BitFit; nothing beyond what every adapter has."""

    variant = "bitfit"


Config = BitFitConfig
to_peft, from_peft = hookimpl(_peft.beft_to_peft), hookimpl(_peft.beft_from_peft)


@hookimpl
def param_specs(d_out: int) -> dict[str, ParamSpec]:
    return {"lora_shift": ParamSpec((d_out,), doc="offset β of the bias")}


@hookimpl
def forward(y: Tensor, params: dict[str, Tensor]) -> Tensor:
    return y + params["lora_shift"].to(y.dtype)
