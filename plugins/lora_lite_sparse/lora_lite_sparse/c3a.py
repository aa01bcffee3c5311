"""C3A: the change is a matrix of circulant blocks, applied as circular convolutions.

    y = W x + b + ΔW x,   block (i, j) of ΔW: C(w_ij) / d_in,   C(w)[k, t] = w[(t − k) mod b]

One kernel w_ij of b numbers for each of the d_out/b · d_in/b blocks, trained from zero, which makes step 0 the
identity. (PEFT's default start is not: it draws the kernels at random. Its folders are read as they are.) Every block
can have full rank. Needs nothing of the base; b must divide d_in and d_out. d_in d_out / b parameters. The convolutions
are products of real Fourier transforms, in float32 at least: O((d_in + d_out) log b) and about 2 d_in d_out / b
multiply-accumulates per token.

Chen, Cheng, Liu, Gao, Tsung, Li, Li: Parameter-Efficient Fine-Tuning via Circular Convolution, 2024,
arXiv:2407.19342.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lite_core import AdapterConfig, ConfigError, ParamSpec, TargetError, hookimpl

from . import _peft

BENCH = {"lr": 3e-1}
LAYERS = ("linear", "convolution", "experts")


@dataclass(frozen=True, kw_only=True)
class C3AConfig(AdapterConfig):
    """Config of C3A.

    block_size  b; must divide the widths of every target. Larger blocks are fewer parameters
    """

    variant = "c3a"

    block_size: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.block_size, int) or self.block_size < 1:
            raise ConfigError(f"C3AConfig(block_size={self.block_size!r}): a whole number of at least 1")


Config = C3AConfig
to_peft, from_peft = hookimpl(_peft.c3a_to_peft), hookimpl(_peft.c3a_from_peft)


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: C3AConfig) -> dict[str, ParamSpec]:
    b = cfg.block_size
    if d_in % b or d_out % b:
        fitting = [n for n in range(1, min(d_in, d_out) + 1) if d_in % n == d_out % n == 0]
        raise TargetError(f"C3AConfig(block_size={b}) on a layer {d_in} → {d_out}: {fitting} divide both")
    return {"lora_kernels": ParamSpec((d_out // b, d_in // b, b), doc="a block's kernel: its first row, times d_in")}


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: C3AConfig) -> Tensor:
    full, b = torch.promote_types(x.dtype, torch.float32), cfg.block_size
    with torch.autocast(x.device.type, enabled=False):
        kernels = torch.fft.rfft(params["lora_kernels"].to(full) / x.shape[-1]).conj()
        blocks = torch.fft.rfft(x.to(full).unflatten(-1, (-1, b)))
        change = torch.fft.irfft(torch.einsum("...jf,ijf->...if", blocks, kernels), n=b)
    return y + change.flatten(-2).to(y.dtype)
