"""MiSS: one small matrix, shared by all shards of the input.

    default   y = W x + b + D Σ_k x_k
    mini      the same, with D made of d_out / mini_r copies of a (mini_r, r) matrix, one below the other
    bat       y_j = (W x + b)_j + Σ_k (W_jk D_j + D_j) x_k

x_k is the k-th shard of r inputs, the last one filled with zeros; y_j in bat the j-th shard of r outputs, W_jk the r ×
r block of the weight between them, D_j an r × r matrix. D (d_out, r) starts as zeros, which makes step 0 the identity,
and is all that is trained; it is multiplied by alpha / r where alpha is given. Needs nothing of the base, but bat the
dense weight in every call, and an r that divides d_in and d_out. d_out r parameters (mini: mini_r r), as many
multiply-accumulates and d_in additions per token; bat d_in d_out, and r times that per call.

Kang, Yin: MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure, 2024, arXiv:2409.15371.
The first versions call it Bone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from lora_lite_core import ConfigError, DropoutConfig, ParamSpec, TargetError, dense_weight, dropped, hookimpl

from . import _peft_blocks

LAYERS = ("linear", "convolution", "experts")
BENCH = {"lr": 5e-3}
MODES = ("default", "mini", "bat")


@dataclass(frozen=True, kw_only=True)
class MiSSConfig(DropoutConfig):
    """Config of MiSS; r is the size of a shard.

    mode    "default", "mini" or "bat"; in bat dropout has no place and is refused
    mini_r  rows of D that are trained in mode mini; divides the d_out of every target
    """

    variant = "miss"

    mode: str = "default"
    mini_r: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in MODES:
            raise ConfigError(f"MiSSConfig(mode={self.mode!r}): the modes are {', '.join(map(repr, MODES))}")
        if self.mini_r < 1:
            raise ConfigError(f"MiSSConfig(mini_r={self.mini_r!r}): it is a whole number of at least 1")
        if self.mode == "bat" and self.dropout:
            raise ConfigError(
                f"MiSSConfig(mode='bat', dropout={self.dropout}): bat changes the weight; set dropout to 0"
            )


Config = MiSSConfig
to_peft, from_peft = hookimpl(_peft_blocks.miss_to_peft), hookimpl(_peft_blocks.miss_from_peft)


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: MiSSConfig) -> dict[str, ParamSpec]:
    if cfg.r > d_in:
        raise TargetError(f"MiSSConfig(r={cfg.r}) on a layer {d_in} → {d_out}: r is at most {d_in}")
    if cfg.mode == "mini" and d_out % cfg.mini_r:
        fitting = [size for size in range(1, min(d_out, 128) + 1) if d_out % size == 0]
        raise TargetError(f"MiSSConfig(mini_r={cfg.mini_r}) does not divide d_out={d_out}; these do: {fitting}")
    if cfg.mode == "bat" and (d_in % cfg.r or d_out % cfg.r):
        fitting = [r for r in range(1, 129) if math.gcd(d_in, d_out) % r == 0]
        raise TargetError(f"MiSSConfig(mode='bat', r={cfg.r}) on a layer {d_in} → {d_out}: {fitting} divide both")
    return {"lora_D": ParamSpec((cfg.mini_r if cfg.mode == "mini" else d_out, cfg.r), doc="what all shards share")}


@hookimpl
def forward(
    x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: MiSSConfig, layer: nn.Module, training: bool
) -> Tensor:
    D, r = params["lora_D"].to(x.dtype), cfg.r
    if cfg.scale != 1.0:
        D = D * cfg.scale
    if cfg.mode == "bat":
        W = dense_weight(layer).to(x.dtype)
        blocks, D = W.unflatten(0, (-1, r)).unflatten(2, (-1, r)), D.unflatten(0, (-1, r))  # (j, r, k, r), (j, r, r)
        change = (blocks.flatten(1, 2) @ D).unflatten(1, (r, -1)) + D[:, :, None]
        return F.linear(x, change.flatten(0, 1).flatten(1)).to(y.dtype) + y
    shards = F.pad(dropped(x, cfg, training), (0, -x.shape[-1] % r)).unflatten(-1, (-1, r)).sum(-2)
    change = F.linear(shards, D)
    copies = y.shape[-1] // len(D)
    return (change.repeat(*(1 for _ in change.shape[1:]), copies) if copies > 1 else change).to(y.dtype) + y
