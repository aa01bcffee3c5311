"""Lily: neighbouring layers share a down-projection, all layers of a kind share several up-projections, a router mixes.

    y = W x + b + s · Σ_e p_e B_e A x,   p = the mean over all tokens of softmax(R A x),   e < experts

A (r, d_in) is shared by `stride` neighbouring blocks and the B_e (d_out, r) by all layers of a kind: those of one size
whose names differ in their block's number alone. R (experts, r) is each layer's own. A and R start as U(±1/√columns), B
as zeros, which makes step 0 the identity. The published p is a mean over everything in the call: an output depends on
the other rows of the batch and on later tokens. average=False gives each token its own p. Needs nothing of the base. r
d_in a group, experts r d_out a kind and experts r a layer are trained; r (d_in + d_out + experts) multiply-accumulates
a token (with average=False r (d_in + experts d_out + experts)). Not affine in x, and so not merged.

Zhong, Zhao, Zhou: Low-Rank Interconnected Adaptation across Layers, 2024 (ACL 2025), arXiv:2407.09946.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lora_lite_core import ConfigError, ParamSpec, RankConfig, hookimpl, project

from ._peft import Pair, Sizes
from ._peft_lily import group_of, lily_from_peft, lily_to_peft

BENCH = {"lr": 5e-3}
AFFINE = False
LAYERS = ("linear", "convolution", "embedding")


@dataclass(frozen=True, kw_only=True)
class LilyConfig(RankConfig):
    """Config of Lily. Ranks are larger than LoRA's, since few factors are trained.

    stride   how many neighbouring blocks share A
    experts  how many B a kind of layer has
    scaling  s
    average  mix by the mean over all tokens of the call, as published; False mixes for each token by itself
    """

    variant = "lily"

    r: int = 32
    stride: int = 1
    experts: int = 2
    scaling: float = 1.0
    average: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("stride", 1), ("experts", 2)):
            given = getattr(self, name)
            if isinstance(given, bool) or not isinstance(given, int) or given < least:
                raise ConfigError(f"LilyConfig({name}={given!r}): a whole number of at least {least}")
        if not self.scaling:
            raise ConfigError(f"LilyConfig(scaling={self.scaling!r}): nothing would be trained; a number other than 0")


Config = LilyConfig


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: LilyConfig, name: str) -> dict[str, ParamSpec]:
    kind, group = group_of(name, cfg.stride)
    A = ParamSpec((cfg.r, d_in), "kaiming_uniform", shared=f"A_{kind}_{group}_{d_out}")
    B = ParamSpec((d_out, cfg.experts * cfg.r), shared=f"B_{kind}_{d_in}", doc="all B_e beside each other")
    return {"lora_A": A, "lora_B": B, "lora_R": ParamSpec((cfg.experts, cfg.r), "kaiming_uniform", doc="the router")}


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: LilyConfig) -> Tensor:
    hidden = project(x, params["lora_A"])
    B = params["lora_B"].to(hidden.dtype)
    p = F.linear(hidden, params["lora_R"].to(hidden.dtype)).softmax(-1) * cfg.scaling
    if not cfg.average:
        return F.linear((p.unsqueeze(-1) * hidden.unsqueeze(-2)).flatten(-2), B).to(y.dtype).add_(y)
    mean = p.reshape(-1, cfg.experts).mean(0)
    mixed = (B.unflatten(1, (cfg.experts, cfg.r)) * mean[:, None]).sum(1)
    return F.linear(hidden, mixed).to(y.dtype).add_(y)


@hookimpl
def to_peft(params: dict[str, Tensor], cfg: LilyConfig, layer: nn.Module, name: str, sizes: Sizes) -> Pair:
    return lily_to_peft(params, cfg, layer, name, sizes)


@hookimpl
def from_peft(config: dict[str, Any], tensors: dict[str, Tensor]) -> Pair | None:
    return lily_from_peft(config, tensors) if config["peft_type"] == "LILY" else None
