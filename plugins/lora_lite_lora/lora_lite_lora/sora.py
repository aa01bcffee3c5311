"""SoRA: LoRA with a gate for each rank, of which training closes those that are of little use.

    y = W x + b + s · B (g ⊙ A x),   s = alpha / r
    a step of the optimizer takes g to g', then g = sign(g') max(|g'| − ξ, 0)

A (r, d_in) starts as U(±1/√d_in), g (r) as N(0, 1), B (d_out, r) as zeros, which makes step 0 the identity; all three
are trained. Cutting g by ξ after every step is what the proximal gradient method makes of an l1 penalty on g: a gate
that the loss does not hold open goes to 0 and stays there, and its rank counts no more. ξ is the learning rate times
the weight of that penalty. Needs `ll.follow(model, optimizer)`, and nothing of the base. r (d_in + d_out + 1)
parameters, r (d_in + d_out) multiply-accumulates per token.

Ding, Lv, Wang, Chen, Zhou, Liu, Sun: Sparse Low-rank Adaptation of Pre-trained Language Models, 2023 (EMNLP),
arXiv:2311.11696.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_lite_core import ConfigError, DropoutConfig, ParamSpec, Target, dropped, hookimpl, project

BENCH = {"lr": 5e-3}


@dataclass(frozen=True, kw_only=True)
class SoRAConfig(DropoutConfig):
    """Config of SoRA; r is the number of gates, the largest rank.

    threshold  ξ, by which every gate is moved towards 0 at a step; n steps close a gate of n ξ that gets no gradient
    """

    variant = "sora"

    threshold: float = 3e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.threshold >= 0:
            raise ConfigError(f"SoRAConfig(threshold={self.threshold!r}): a threshold is a number from 0")


Config = SoRAConfig


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: SoRAConfig) -> dict[str, ParamSpec]:
    return {
        "lora_A": ParamSpec((cfg.r, d_in), "kaiming_uniform"),
        "lora_g": ParamSpec((cfg.r,), _normal, doc="gates"),
        "lora_B": ParamSpec((d_out, cfg.r)),
        "lora_xi": ParamSpec((1,), as_buffer=True, doc="what the gates are yet to be cut by: 0 before the first step"),
    }


def _normal(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.normal_(generator=generator)


def _cut(params: dict[str, Tensor]) -> Tensor:
    g = params["lora_g"].detach()
    return g.sign() * (g.abs() - params["lora_xi"]).relu()


@hookimpl
def before_step(targets: tuple[Target, ...], cfg: SoRAConfig) -> None:
    for target in targets:
        target.params["lora_g"].copy_(_cut(dict(target.params)))  # what forward has computed with since the last step
        target.params["lora_xi"].fill_(cfg.threshold)


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: SoRAConfig, training: bool) -> Tensor:
    g = _cut(params) + (params["lora_g"] - params["lora_g"].detach())  # its value; the gradient of all gates
    h = project(dropped(x, cfg, training), params["lora_A"])
    return F.linear(h * (cfg.scale * g).to(h.dtype), params["lora_B"].to(h.dtype)).to(y.dtype).add_(y)
