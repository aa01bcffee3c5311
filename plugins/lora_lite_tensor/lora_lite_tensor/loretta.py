"""LoRETTA: LoRA's two factors are tensor trains.

    y = W x + b + s · B (A x),   s = alpha / r,   A (r, d_in) and B (d_out, r) as trains of small cores

d_in is split into `axes` numbers n_1 … n_k, the largest first, and A[j, (i_1 … i_k)] = G_1[i_1] G_2[i_2] … G_k[i_k]
H[:, j], a product of matrices: G_1 (n_1, t), G_m (t, n_m, t), H (t, r), t being tt_rank. B likewise, of d_out. All
cores are trained. Those of A start so that its entries have the size of LoRA's A; of B the last, H, starts as zeros,
which makes step 0 the identity, the others so that their product has entries of about 1. Needs nothing of the base. For
both factors together about t² Σ n_m + t r parameters each, some hundreds where LoRA has ten thousands. A and B are made
of the cores at each call, about t² d + t r d multiply-accumulates each; per token it is LoRA.

Yang, Zhou, Wong, Zhang: LoRETTA, 2024 (NAACL), arXiv:2402.11417; this is LoRETTA_rep, its form beside the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lite_core import ConfigError, LowRankConfig, ParamSpec, hookimpl, lowrank_delta

from ._widths import factors

BENCH = {"lr": 1e-2}


@dataclass(frozen=True, kw_only=True)
class LoRETTAConfig(LowRankConfig):
    """Config of LoRETTA.

    tt_rank  t, the size of the products between the cores
    axes     into how many numbers the widths are split, from 2 to 32
    """

    variant = "loretta"

    tt_rank: int = 5
    axes: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("tt_rank", 1), ("axes", 2)):
            if not isinstance(value := getattr(self, name), int) or value < least:
                raise ConfigError(f"LoRETTAConfig({name}={value!r}): a whole number of at least {least}")
        if self.axes > 32:
            raise ConfigError(f"LoRETTAConfig(axes={self.axes!r}): at most 32; no width has more factors")


Config = LoRETTAConfig


def _train(side: str, width: int, cfg: LoRETTAConfig, size: float, *, zero: bool) -> dict[str, ParamSpec]:
    """The cores of a factor, random so that the entries of their product have about this size."""
    t, sizes = cfg.tt_rank, factors(width, cfg.axes)
    shapes = [(sizes[0], t), *((t, n, t) for n in sizes[1:]), (t, cfg.r)]
    random = len(shapes) - zero  # the last core of a zero factor is none of the product
    std = (size**2 / t ** (random - 1)) ** (0.5 / random)

    def normal(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.normal_(std=std, generator=generator)

    names = [f"lora_{side}{number}" for number in range(len(shapes))]
    return {
        name: ParamSpec(shape, "zeros" if zero and shape is shapes[-1] else normal)
        for name, shape in zip(names, shapes, strict=True)
    }


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: LoRETTAConfig) -> dict[str, ParamSpec]:
    A = _train("A", d_in, cfg, (3 * d_in) ** -0.5, zero=False)
    return A | _train("B", d_out, cfg, 1.0, zero=True)


def _whole(params: dict[str, Tensor], side: str, axes: int) -> Tensor:
    """(width, r)."""
    product = params[f"lora_{side}0"]
    for number in range(1, axes):
        core = params[f"lora_{side}{number}"]
        product = (product @ core.flatten(1)).view(-1, core.shape[-1])
    return product @ params[f"lora_{side}{axes}"]


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: LoRETTAConfig) -> Tensor:
    A, B = (_whole(params, side, cfg.axes) for side in "AB")
    return lowrank_delta(x, A.T, B, cfg.scale).to(y.dtype).add_(y)
