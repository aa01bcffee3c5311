"""AdaLoRA: LoRA in the form of an SVD, whose ranks go to the layers that need them while training goes on.

    y = W x + b + s · P diag(m ⊙ λ) Q x,   s = alpha / r

P (d_out, r) and Q (r, d_in) start as N(0, 0.02²), λ (r) as zeros, which makes step 0 the identity; all are trained. The
score of an entry w is its smoothed sensitivity |w ∂w| times how far that has been from its mean; a triplet has that of
its λ and the mean ones of its column of P and row of Q. m (r) is 1 for the best triplets of all layers, as many as the
budget has: all for `tinit` steps, then less by a cubic curve, from `tfinal` steps before the end on `target_r` a layer,
which stay. Every `interval` steps triplets are chosen; λ of the others becomes 0, and may grow again in between. Needs
`ll.follow(model, optimizer)`, and nothing of the base. `penalty` is ‖PᵀP − I‖² + ‖QQᵀ − I‖². r (d_in + d_out + 1)
parameters, twice as many numbers for the scores (saved, so that training goes on from a file without a jump),
r (d_in + d_out) multiply-accumulates per token.

Zhang, Chen, Bukharin, Karampatziakis, He, Cheng, Chen, Zhao: AdaLoRA, 2023 (ICLR), arXiv:2303.10512.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_lite_core import ConfigError, DropoutConfig, ParamSpec, Target, dropped, hookimpl, project

from . import _adalora_budget, _peft_adalora

BENCH = {"lr": 2e-2}


@dataclass(frozen=True, kw_only=True)
class AdaLoRAConfig(DropoutConfig):
    """Config of AdaLoRA; r is the rank of each layer at first.

    target_r         mean rank of the layers at the end; None is two thirds of r, rounded up
    total_step       steps of the whole training, over which the schedule is laid: set it
    tinit, tfinal    steps with all ranks at first, and with those that stay at the end
    interval         steps from one choice to the next
    beta1, beta2     how much of the mean of sensitivities, and of distances from it, stays at a step
    orth_reg_weight  of the penalty of each layer; PEFT's weighs another one, and is only read as 0 or not
    """

    variant = "adalora"

    target_r: int | None = None
    total_step: int = 1000
    tinit: int = 100
    tfinal: int = 300
    interval: int = 10
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if problem := _adalora_budget.problem(self):
            raise ConfigError(f"AdaLoRAConfig({problem}")


Config = AdaLoRAConfig
to_peft, from_peft = hookimpl(_peft_adalora.to_peft), hookimpl(_peft_adalora.from_peft)


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: AdaLoRAConfig) -> dict[str, ParamSpec]:
    shapes = {"lora_P": (d_out, cfg.r), "lora_l": (cfg.r,), "lora_Q": (cfg.r, d_in)}
    specs = {name: ParamSpec(shape, "zeros" if name == "lora_l" else _small) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        specs |= {f"{name}_{of}": ParamSpec(shape, as_buffer=True) for of in ("mean", "unsure")}
    return specs | {"lora_m": ParamSpec((cfg.r,), "ones", as_buffer=True, doc="1 for triplets that stay")}


def _small(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.normal_(std=0.02, generator=generator)


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: AdaLoRAConfig, training: bool) -> Tensor:
    P, l, Q = (params[f"lora_{key}"] for key in "PlQ")
    l = l - (l * (1 - params["lora_m"])).detach()  # the value of those that stay, the gradient of all
    h = project(dropped(x, cfg, training), Q)
    return F.linear(h * (l * cfg.scale).to(h.dtype), P.to(h.dtype)).to(y.dtype).add_(y)


@hookimpl
def penalty(params: dict[str, Tensor], cfg: AdaLoRAConfig) -> Tensor:
    P, Q = (params[name].to(torch.promote_types(params[name].dtype, torch.float32)) for name in ("lora_P", "lora_Q"))
    I = torch.eye(len(Q), dtype=Q.dtype, device=Q.device)
    return cfg.orth_reg_weight * ((P.T @ P - I).square().sum() + (Q @ Q.T - I).square().sum())


@hookimpl
def before_step(targets: tuple[Target, ...], cfg: AdaLoRAConfig, step: int) -> None:
    for target in targets:
        target.params["lora_l"].mul_(target.params["lora_m"])  # what the last step has done to those left out is undone
    _adalora_budget.choose(targets, cfg, step)
