"""RoAd: pairs of outputs are rotated and scaled.

    y' = R (W x + b),   per pair (y₁, y₂):  (α cos θ y₁ − α sin θ y₂,  α sin θ y₁ + α cos θ y₂)

mode 1 has one (θ, α) per pair, mode 2 one per row of each 2 × 2 block, mode 4 one per entry. θ starts as zeros and α as
1 + δ with δ zero, which makes R the identity. Within a group of g outputs, output j is paired with j + g/2. θ and δ
hold, group by group, in mode 1 the g/2 pairs, in mode 2 the g/2 first rows and then the second ones, in mode 4 that for
the entries with cosines and then for those with sines. The bias is rotated too. Needs nothing of the base. d_out, 2
d_out or 4 d_out parameters; elementwise work of 2 d_out per token and no matrix product.

Liao, Monz: 3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability, 2024 (NeurIPS),
arXiv:2409.00119.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lite_core import AdapterConfig, ConfigError, ParamSpec, hookimpl

from . import _peft_turns
from ._gates import gated


@dataclass(frozen=True, kw_only=True)
class RoAdConfig(AdapterConfig):
    """Config of RoAd.

    mode        1, 2 or 4
    group_size  g, even, a divisor of every target's d_out; None is the largest even divisor of d_out up to 64
    """

    variant = "road"

    mode: int = 1
    group_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in (1, 2, 4):
            raise ConfigError(f"RoAdConfig(mode={self.mode!r}): the modes are 1, 2 and 4")
        g = self.group_size
        if g is not None and (not isinstance(g, int) or g < 2 or g % 2):
            raise ConfigError(f"RoAdConfig(group_size={g!r}): outputs are paired, so a group is an even number of them")


Config = RoAdConfig
to_peft, from_peft = hookimpl(_peft_turns.road_to_peft), hookimpl(_peft_turns.road_from_peft)


def _group(d_out: int, cfg: RoAdConfig) -> int:
    if d_out % 2:
        raise ConfigError(
            f"RoAdConfig: d_out={d_out} is odd and cannot be paired; leave the layer out with exclude_names"
        )
    if cfg.group_size is None:
        return next(size for size in range(64, 0, -2) if d_out % size == 0)
    if d_out % cfg.group_size:
        fitting = [size for size in range(2, d_out + 1, 2) if d_out % size == 0]
        raise ConfigError(
            f"RoAdConfig(group_size={cfg.group_size}) does not divide d_out={d_out}; sizes that do: {fitting}"
        )
    return cfg.group_size


@hookimpl
def param_specs(d_out: int, cfg: RoAdConfig) -> dict[str, ParamSpec]:
    _group(d_out, cfg)
    size = (cfg.mode * d_out // 2,)
    return {
        "lora_theta": ParamSpec(size, doc="angles"),
        "lora_alpha": ParamSpec(size, doc="offsets of the scales from 1"),
    }


@hookimpl
def forward(y: Tensor, params: dict[str, Tensor], cfg: RoAdConfig) -> Tensor:
    half = _group(y.shape[-1], cfg) // 2
    full = torch.promote_types(y.dtype, torch.float32)
    # (groups, {cosine, sine part}, {first, second row}, g/2); a mode that has one for both has 1 there
    parts = {1: (1, 1), 2: (1, 2), 4: (2, 2)}[cfg.mode]
    theta, delta = (params[f"lora_{name}"].to(full).reshape(-1, *parts, half) for name in ("theta", "alpha"))
    alpha = 1 + delta
    cosine, sine = alpha[:, 0] * theta[:, 0].cos(), (alpha[:, -1] * theta[:, -1].sin()).to(y.dtype)
    y1, y2 = y.reshape(*y.shape[:-1], y.shape[-1] // (2 * half), 2, half).unbind(-2)
    first = torch.addcmul(gated(y1, cosine[:, 0]), y2, sine[:, 0], value=-1)
    second = torch.addcmul(gated(y2, cosine[:, -1]), y1, sine[:, -1])
    return torch.stack((first, second), dim=-2).reshape(y.shape)
