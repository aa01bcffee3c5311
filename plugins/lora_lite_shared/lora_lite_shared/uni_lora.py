"""Uni-LoRA: one trained vector for the whole model; every entry of every low-rank factor is one of its numbers.

    y = W x + b + B A x,   A = (c ⊙ θ)[I_A],   B = (c ⊙ θ)[I_B],   c_j = 1 / √(how often j occurs in all I_A and I_B)

θ (d) is trained and shared by all layers. I_A (r, d_in) and I_B (d_out, r) say which number of θ each entry is, drawn
at random so that in each of them every number comes equally often, fixed, and saved. Seen as one matrix from θ to all
entries of all factors it has orthonormal columns, which is what c is for; c is counted over all layers at attach. θ
starts as U(±bound): B A is small and not zero, else nothing had a gradient, so that step 0 is near the identity and not
quite. Needs nothing of the base. d parameters for the whole model; r (d_in + d_out) multiply-accumulates per token. The
file holds the places, 2 bytes for each entry of the factors (4 where θ is longer than 32767).

Li, Han, Su, Li, Cai, Ji: Uni-LoRA: One Vector is All You Need, 2025 (NeurIPS), arXiv:2506.00799; places as balanced as
in the peft package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite_core import ConfigError, ParamSpec, RankConfig, Target, hookimpl, lowrank_delta

from ._peft import Pair, Sizes
from ._peft_uni_lora import uni_lora_from_peft, uni_lora_to_peft

BENCH = {"lr": 5e-1}
IDENTITY_ATOL = 1e-2
IDENTITY_REASON = "published start: θ is U(±0.02), so that B A is small and not zero"


@dataclass(frozen=True, kw_only=True)
class UniLoRAConfig(RankConfig):
    """Config of Uni-LoRA.

    length  d, how many numbers θ has: all that is trained
    bound   θ starts as U(±bound)
    """

    variant = "uni_lora"

    r: int = 4
    length: int = 256
    bound: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.length, bool) or not isinstance(self.length, int) or self.length < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"UniLoRAConfig(length={self.length!r}): a whole number of at least 1")
        if not self.bound > 0:
            raise ConfigError(f"UniLoRAConfig(bound={self.bound!r}): a vector of zeros has no gradient; above 0")


Config = UniLoRAConfig


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: UniLoRAConfig) -> dict[str, ParamSpec]:
    def places(tensor: Tensor, generator: torch.Generator) -> None:
        drawn = torch.randperm(tensor.numel(), generator=generator)
        first = torch.randint(cfg.length, (1,), generator=generator)
        tensor.copy_(((drawn + first) % cfg.length).view_as(tensor))

    whole = torch.int16 if cfg.length < 2**15 else torch.int32
    start = ParamSpec((cfg.length,), lambda t, g: t.uniform_(-cfg.bound, cfg.bound, generator=g), shared="theta")
    return {
        "lora_theta": start,
        "lora_c": ParamSpec((cfg.length,), "ones", trainable=False, shared="c"),
        "lora_I_A": ParamSpec((cfg.r, d_in), places, trainable=False, dtype=whole, doc="places of A in θ"),
        "lora_I_B": ParamSpec((d_out, cfg.r), places, trainable=False, dtype=whole, doc="places of B in θ"),
    }


@hookimpl
def group_init(targets: tuple[Target, ...], cfg: UniLoRAConfig) -> None:
    places = [target.params[name].flatten().long() for target in targets for name in ("lora_I_A", "lora_I_B")]
    counts = sum(torch.bincount(one.cpu(), minlength=cfg.length) for one in places)
    for c in {id(c): c for target in targets for c in [target.params["lora_c"]]}.values():
        c.copy_(torch.as_tensor(counts).clamp_min(1).to(c.dtype).rsqrt())


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor]) -> Tensor:
    numbers = params["lora_theta"] * params["lora_c"]
    A, B = (numbers.index_select(0, i.flatten().int()).view_as(i) for i in (params["lora_I_A"], params["lora_I_B"]))
    return lowrank_delta(x, A, B).to(y.dtype).add_(y)


@hookimpl
def to_peft(params: dict[str, Tensor], cfg: UniLoRAConfig, layer: nn.Module) -> Pair:
    return uni_lora_to_peft(params, cfg, layer)


@hookimpl
def from_peft(config: dict[str, Any], tensors: dict[str, Tensor], name: str, sizes: Sizes) -> Pair | None:
    return uni_lora_from_peft(config, tensors, name, sizes) if config["peft_type"] == "UNILORA" else None
