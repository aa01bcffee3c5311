"""BOFT: the input is rotated by a product of block rotations whose blocks reach further and further apart.

    y = (1 + δ) ⊙ W (R x) + b,   R = M₀ M₁ … M_{m−1},   Mᵢ = Pᵢ blockdiag(Rᵢ₁ … Rᵢₙ) Pᵢᵀ,   Rᵢⱼ = (I − Q)⁻¹ (I + Q)

Q is skew-symmetric, b × b; n = d_in / b blocks. The blocks of factor i are made of two halves (b/2 inputs) that are 2ⁱ
halves apart, as in a fast Fourier transform: with m factors each input of a stretch of b 2ᵐ⁻¹ reaches every other. q
(m·n, b(b−1)/2), the strict upper triangles, and δ (d_out), the offset of a scale of each output (the bias left out),
are trained from zero, which makes step 0 the identity. m = 1 is OFT with that scale. Needs nothing of the base but its
bias. m d_in (b − 1) / 2 + d_out parameters, m d_in b + d_out multiply-accumulates per token. Folders of the peft
package go both ways; it opens those with m > 1 only where its CUDA extension can be built.

Liu, Qiu, Feng, Xiu, Xue, Yu, Feng, Liu, Heo, Peng, Wen, Black, Weller, Schölkopf: Parameter-Efficient Orthogonal
Finetuning via Butterfly Factorization, 2023 (ICLR 2024), arXiv:2311.06243.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lite_core import AdapterConfig, ConfigError, ParamSpec, TargetError, hookimpl, remembered

from . import _peft_butterfly
from ._gates import shifted
from ._turns import offset_of, turned

BENCH = {"lr": 3e-3}


@dataclass(frozen=True, kw_only=True)
class BOFTConfig(AdapterConfig):
    """Config of BOFT.

    block_size  b, at least 2; even where there are several factors
    factors     m; b 2ᵐ⁻¹ must divide the d_in of every target
    block_num   n, the number of blocks, in the place of their size; None counts by block_size
    """

    variant = "boft"

    block_size: int = 8
    factors: int = 2
    block_num: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("block_size", 2), ("factors", 1), ("block_num", 1)):
            value = getattr(self, name)
            if (value is not None or name != "block_num") and (not isinstance(value, int) or value < least):
                raise ConfigError(f"BOFTConfig({name}={value!r}): give a whole number of at least {least}")
        if self.block_num is None and self.factors > 1 and self.block_size % 2:
            raise ConfigError(f"BOFTConfig(block_size={self.block_size}): {self.factors} factors need halves of blocks")


Config = BOFTConfig
to_peft, from_peft = hookimpl(_peft_butterfly.boft_to_peft), hookimpl(_peft_butterfly.boft_from_peft)


def _size(d_in: int, cfg: BOFTConfig) -> int:
    """b on a layer of that width."""
    reach, step = 1 << min(cfg.factors - 1, 62), 1 if cfg.factors == 1 else 2
    fitting = [size for size in range(2, d_in // reach + 1, step) if d_in % (size * reach) == 0]
    b = cfg.block_size if cfg.block_num is None else d_in // cfg.block_num
    if b not in fitting or (cfg.block_num is not None and b * cfg.block_num != d_in):
        given = f"block_size={b}" if cfg.block_num is None else f"block_num={cfg.block_num}"
        raise TargetError(
            f"BOFTConfig({given}, factors={cfg.factors}) on a layer with d_in={d_in}: block sizes that fit: {fitting}"
        )
    return b


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: BOFTConfig) -> dict[str, ParamSpec]:
    b = _size(d_in, cfg)
    q = ParamSpec((cfg.factors * d_in // b, b * (b - 1) // 2), doc="strict upper triangles of Q, factor by factor")
    return {"lora_q": q, "lora_s": ParamSpec((d_out,), doc="offset δ of the scale of outputs from 1")}


@hookimpl
def forward_input(x: Tensor, params: dict[str, Tensor], cfg: BOFTConfig) -> Tensor:
    b, full = _size(x.shape[-1], cfg), torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        offsets = remembered(offset_of, params["lora_q"], b, None, full).unflatten(0, (cfg.factors, -1))  # R − I
        for i, R in reversed([*enumerate(offsets)]):
            if i == 0:
                x = turned(x.unflatten(-1, (-1, b)), R).flatten(-2)
            else:
                halves = x.unflatten(-1, (-1, 2, 1 << i, b // 2)).transpose(-3, -2)
                pairs = turned(halves.flatten(-2).flatten(-3, -2), R)
                x = pairs.reshape(halves.shape).transpose(-3, -2).flatten(-4)
        return x


@hookimpl
def forward(y: Tensor, params: dict[str, Tensor], layer: nn.Module) -> Tensor:
    delta, bias = params["lora_s"].to(torch.promote_types(y.dtype, torch.float32)), getattr(layer, "bias", None)
    return shifted(y, delta, -delta * bias if bias is not None else torch.zeros_like(delta))
