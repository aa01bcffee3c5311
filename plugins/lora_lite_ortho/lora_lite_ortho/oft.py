"""OFT: the input's blocks are rotated.

    y = W (R x) + b,   R = blockdiag(R₁ … R_n),   Rᵢ = (I + Qᵢ)(I − Qᵢ)⁻¹,   Qᵢ skew-symmetric, b × b

q (n, b(b−1)/2), the strict upper triangles of Q, starts as zeros, which makes every Rᵢ the identity. The Cayley
transform is exact, with closed forms for blocks of 2 and 4. The convention is the paper's, for column vectors: the peft
package's exact mode turns the same way, its default, a truncated series, the other way; folders of both are read.
Options: terms=5 is that series, (I + Q)(I + Q + Q² + Q³), a rotation for small Q only; coft holds each ‖Qᵢ‖_F at most
eps / √n (the gradient passes by, so that q can come back); block_share has one block for all. Needs nothing of the
base. d_in (b − 1) / 2 parameters (shared: b (b − 1) / 2), d_in · b multiply-accumulates per token, and n inverses of
b × b per call; without gradients on a processor only when q has changed.

Qiu, Liu, Feng, Xue, Feng, Liu, Zhang, Weller, Schölkopf: Controlling Text-to-Image Diffusion by Orthogonal Finetuning,
2023, arXiv:2306.07280. Input-sided as in Qiu et al.: Orthogonal Finetuning Made Scalable, 2025, arXiv:2506.19847.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lite_core import AdapterConfig, ConfigError, ParamSpec, hookimpl, remembered

from . import _peft_turns
from ._turns import bounded, check_terms, rotation_offset, turned


@dataclass(frozen=True, kw_only=True)
class OFTConfig(AdapterConfig):
    """Config of OFT.

    block_size   b, at least 2; must divide the d_in of every target
    block_share  one block for all places
    coft         constrained OFT: Q stays within eps
    eps          the bound, with coft
    terms        of the truncated series, from 2 to 100; None turns exactly
    """

    variant = "oft"

    block_size: int = 32
    block_share: bool = False
    coft: bool = False
    eps: float = 6e-5
    terms: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.block_size, int) or self.block_size < 2:
            raise ConfigError(f"OFTConfig(block_size={self.block_size!r}): a rotation needs a block of at least 2")
        if not isinstance(self.eps, (int, float)) or not self.eps > 0:
            raise ConfigError(f"OFTConfig(eps={self.eps!r}): the bound on Q is a number above 0")
        check_terms("OFTConfig", self.terms)


Config = OFTConfig
to_peft, from_peft = hookimpl(_peft_turns.oft_to_peft), hookimpl(_peft_turns.oft_from_peft)


@hookimpl
def param_specs(d_in: int, cfg: OFTConfig) -> dict[str, ParamSpec]:
    b = cfg.block_size
    if d_in % b:
        fitting = [size for size in range(2, min(d_in, 128) + 1) if d_in % size == 0]
        raise ConfigError(f"OFTConfig(block_size={b}) does not divide d_in={d_in}; block sizes that do: {fitting}")
    count = 1 if cfg.block_share else d_in // b
    return {"lora_q": ParamSpec((count, b * (b - 1) // 2), doc="strict upper triangles of Q")}


def _offset(q: Tensor, cfg: OFTConfig, full: torch.dtype) -> Tensor:
    """Rᵢ − I."""
    q = q.to(full)
    if cfg.coft:
        q = q + (bounded(q, cfg.eps) - q).detach()
    return rotation_offset(q, cfg.block_size, cfg.terms)


@hookimpl
def forward_input(x: Tensor, params: dict[str, Tensor], cfg: OFTConfig) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        offset = remembered(_offset, params["lora_q"], cfg, torch.promote_types(x.dtype, torch.float32))
        return turned(x.unflatten(-1, (-1, cfg.block_size)), offset).flatten(-2)
