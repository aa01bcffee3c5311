"""DyLoRA: a LoRA that is trained for all ranks up to r at once, and cut to any of them afterwards.

    training   y = W x + b + s(b) · B[:, :b] A[:b] x,   b drawn from min_r … r at every step, the same for all layers
    in use     the same with any b up to r,   s(b) = alpha / b, or 1 where alpha is not given

A (r, d_in) starts as U(±1/√d_in), B (d_out, r) as zeros, which makes step 0 the identity; both are trained. What the
first ranks learn has to do without the others, so that those in front matter most. b is drawn before every optimizer
step, from the number of that step: training from a file goes on with the same draws, and all processes have the same.
Needs `ll.follow(model, optimizer)`, and nothing of the base. The rank in use (`use_r`, at first r) is a tensor of one
whole number in each layer, saved with it; to change it later:

    for target in adapter.layers().values():
        target.params["lora_rank"].fill_(4)

Then the model computes, merges and exports (`ll.export_lora`) a LoRA of rank 4. r (d_in + d_out) parameters and
multiply-accumulates per token.

Valipour, Rezagholizadeh, Kobyzev, Ghodsi: DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using Dynamic
Search-Free Low-Rank Adaptation, 2022 (EACL 2023), arXiv:2210.07558.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_lite_core import ConfigError, DropoutConfig, ParamSpec, Target, dropped, hookimpl, project

BENCH = {"lr": 5e-3}


@dataclass(frozen=True, kw_only=True)
class DyLoRAConfig(DropoutConfig):
    """Config of DyLoRA; r is the largest rank.

    min_r  the smallest rank that is trained for
    use_r  the rank outside of training; None is r
    """

    variant = "dylora"

    min_r: int = 1
    use_r: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("min_r", "use_r"):
            rank = getattr(self, name)
            if rank is not None and (rank < 1 or (rank > self.r and not self.rank_pattern)):
                raise ConfigError(f"DyLoRAConfig({name}={rank!r}, r={self.r}): a rank to cut to is from 1 to r")


Config = DyLoRAConfig


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: DyLoRAConfig) -> dict[str, ParamSpec]:
    def rank(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.fill_(min(cfg.use_r or cfg.r, cfg.r))

    def whole(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.fill_(cfg.r)

    return {
        "lora_A": ParamSpec((cfg.r, d_in), "kaiming_uniform"),
        "lora_B": ParamSpec((d_out, cfg.r)),
        "lora_rank": ParamSpec((1,), rank, as_buffer=True, dtype=torch.int64, doc="how many ranks are in use"),
        "lora_b": ParamSpec((1,), whole, as_buffer=True, dtype=torch.int64, doc="how many this training step has"),
    }


@hookimpl
def before_step(targets: tuple[Target, ...], cfg: DyLoRAConfig, step: int) -> None:
    share = float(torch.rand((), generator=torch.Generator().manual_seed(step)))
    for target in targets:
        r, least = target.cfg.r, min(cfg.min_r, target.cfg.r)
        target.params["lora_b"].fill_(least + int(share * (r - least + 1)))


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: DyLoRAConfig, training: bool) -> Tensor:
    h = project(dropped(x, cfg, training), params["lora_A"])
    b = params["lora_b" if training else "lora_rank"].clamp(1, cfg.r)
    kept = (torch.arange(cfg.r, device=b.device) < b).to(torch.promote_types(h.dtype, torch.float32))
    scale = kept if cfg.alpha is None else kept * cfg.alpha / b
    return F.linear(h * scale.to(h.dtype), params["lora_B"].to(h.dtype)).to(y.dtype).add_(y)
