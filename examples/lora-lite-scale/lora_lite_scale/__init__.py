"""Scale: one trainable factor per block of a layer's outputs, y' = (1 + g) ⊙ y; zero g is the identity."""

from dataclasses import dataclass

import torch

from lora_lite_core import AdapterConfig, ConfigError, ParamSpec, hookimpl


@dataclass(frozen=True, kw_only=True)
class ScaleConfig(AdapterConfig):
    variant = "scale"
    block: int = 4


Config = ScaleConfig


@hookimpl
def param_specs(d_out, cfg):
    if d_out % cfg.block:
        raise ConfigError(f"ScaleConfig(block={cfg.block}): {d_out} outputs do not divide into such blocks")
    return {"lora_g": ParamSpec((d_out // cfg.block,), doc="offset of each block's factor from 1")}


@hookimpl
def forward(y, params, cfg):
    return torch.addcmul(y, y, params["lora_g"].repeat_interleave(cfg.block).to(y.dtype))
