"""MoRA: a square matrix instead of two low-rank factors, between a fixed compression and a fixed decompression.

    rotation   y_t = (W x + b)_t + M R_t x_t     t = 0 … the chunks of the input, of the output
    sharing    y_t = (W x + b)_t + M Σ_u x_u

x_t is the t-th chunk of q inputs, the last one filled with the first inputs; y_t that of q outputs, the last one cut.
R_t turns the pair (i, i + q/2) of a chunk by the angle t / 10000^(2i/q), as rotary embeddings do, which tells the
chunks apart. Chunks of the output beyond those of the input repeat them; chunks of the input beyond those of the
output are left out (rotation). M (q, q) with q = round(√(r (d_in + d_out))), as many numbers as a LoRA of rank r,
starts as zeros, which makes step 0 the identity, and is all that is trained; it is multiplied by alpha / r where alpha
is given. The rank of the change is up to q. Needs nothing of the base. q² parameters; q² multiply-accumulates per
chunk and token (sharing: q²).

Jiang, Huang, Luo, Zhang, Huang, Wei, Deng, Sun, Zhang, Wang, Zhuang: MoRA: High-Rank Updating for Parameter-Efficient
Fine-Tuning, 2024, arXiv:2405.12130. Types 6 (rotation) and 1 (sharing) of the authors' code, which has no scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_lite_core import ConfigError, DropoutConfig, ParamSpec, TargetError, dropped, hookimpl

LAYERS = ("linear", "convolution", "experts")
BENCH = {"lr": 5e-3}
KINDS = ("rotation", "sharing")


@dataclass(frozen=True, kw_only=True)
class MoRAConfig(DropoutConfig):
    """Config of MoRA; r is the rank of the LoRA that has as many parameters.

    kind  how inputs are compressed and outputs decompressed: "rotation" or "sharing"
    """

    variant = "mora"

    kind: str = "rotation"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in KINDS:
            raise ConfigError(f"MoRAConfig(kind={self.kind!r}): the kinds are {', '.join(map(repr, KINDS))}")

    def size(self, d_in: int, d_out: int, r: int | None = None) -> int:
        """q, an even number for rotations."""
        q = int(math.sqrt((d_in + d_out) * (r or self.r)) + 0.5)
        return q // 2 * 2 if self.kind == "rotation" else q


Config = MoRAConfig


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: MoRAConfig) -> dict[str, ParamSpec]:
    q, most = cfg.size(d_in, d_out), min(d_in, d_out)
    if not 0 < q <= most:
        fitting = [r for r in range(1, most + 1) if 0 < cfg.size(d_in, d_out, r) <= most]
        raise TargetError(
            f"MoRAConfig(r={cfg.r}) on a layer {d_in} → {d_out} makes a matrix of {q} × {q}, and its size is at most "
            f"{most}: " + (f"r is from {fitting[0]} to {fitting[-1]}" if fitting else "the layer is too narrow")
        )
    return {"lora_M": ParamSpec((q, q), doc="from a compressed input to a compressed output")}


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: MoRAConfig, training: bool) -> Tensor:
    M = params["lora_M"].to(x.dtype)
    q, d_out, x = len(M), y.shape[-1], dropped(x, cfg, training)
    short = -x.shape[-1] % q
    chunks = (torch.cat([x, x[..., :short]], -1) if short else x).unflatten(-1, (-1, q))
    used = -(-d_out // q)
    chunks = chunks.sum(-2, keepdim=True) if cfg.kind == "sharing" else _turned(chunks[..., :used, :])
    change = F.linear(chunks, M if cfg.scale == 1.0 else M * cfg.scale).flatten(-2)
    if copies := -(-d_out // change.shape[-1]) - 1:
        change = torch.cat([change] * (copies + 1), -1)
    return change[..., :d_out].to(y.dtype) + y


def _turned(chunks: Tensor) -> Tensor:
    """Chunk t (…, t, q) turned by R_t."""
    full = torch.promote_types(chunks.dtype, torch.float32)
    count, half = chunks.shape[-2], chunks.shape[-1] // 2
    speeds = 10000 ** (-torch.arange(half, device=chunks.device, dtype=full) / half)
    angles = torch.outer(torch.arange(count, device=chunks.device, dtype=full), speeds)
    cos, sin = angles.cos().to(chunks.dtype), angles.sin().to(chunks.dtype)
    first, second = chunks[..., :half], chunks[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
