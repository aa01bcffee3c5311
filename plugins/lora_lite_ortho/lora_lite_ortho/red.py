"""RED: what a feed-forward block returns is scaled and shifted.

    h' = (1 + g) ⊙ h + β,   h the block's output

g and β (d) are trained from zero, the offsets of the published scaling 1 + g and bias β; so step 0 is the identity.
Goes on whole modules, by default those called mlp, ffn or feed_forward, because the published method edits the
representation behind the feed-forward; with target_names=() on the model's blocks, whose output is the residual
stream. Needs nothing of the base. 2 d parameters, d multiplications and additions per token. A module has no weight to
merge into; where it ends with a linear layer, `ssf` on that layer computes the same and merges.

Wu, Liu, Wang, Li, Lv, Ling, Zhu, Zhang, Zheng, Huang: Advancing Parameter Efficiency in Fine-tuning via Representation
Editing, 2024 (ACL), arXiv:2402.15179.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lite_core import AdapterConfig, ParamSpec, hookimpl

from ._gates import shifted

LAYERS = ("block",)
AFFINE = False  # of a whole module
BENCH = {"lr": 1e-1}


@dataclass(frozen=True, kw_only=True)
class REDConfig(AdapterConfig):
    """Config of RED; target_names names modules that return a hidden state, feed-forwards where it is left out."""

    variant = "red"

    target_names: tuple[str, ...] = (r"(^|\.)(mlp|ffn|feed_forward)$",)


Config = REDConfig


@hookimpl
def param_specs(d_out: int) -> dict[str, ParamSpec]:
    return {
        "lora_g": ParamSpec((d_out,), doc="offset of the scaling from 1"),
        "lora_shift": ParamSpec((d_out,), doc="shift β"),
    }


@hookimpl
def forward(y: Tensor, params: dict[str, Tensor]) -> Tensor:
    full = torch.promote_types(y.dtype, torch.float32)
    return shifted(y, params["lora_g"].to(full), params["lora_shift"].to(full))
