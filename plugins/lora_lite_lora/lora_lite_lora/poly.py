"""Poly: an inventory of LoRAs, the skills, and for each task a learnt mixture of them (Polytropon; with splits, MHR).

    y = W x + b + 1/r · B_t A_t x,   A_t = Σ_k p_tk A_k,   B_t = Σ_k p_tk B_k,   p_tk = σ(Z_tk) / Σ_j σ(Z_tj)

t is the task of the row of the batch: `with ll.context(model, task_ids=ids): model(…)`, an id for
each row, or one for all. A_k (r, d_in) start as U(±1/√d_in), B_k (d_out, r) as zeros, which makes step 0 the identity,
and Z (tasks, skills) as U(±1e-3); all are trained. lora_A holds the A_k one below the other, lora_B the B_k one beside
the other. In training σ(Z + ln u − ln(1 − u)), u ~ U(0, 1), is drawn for each row in the place of σ(Z), a relaxed
Bernoulli variable. With splits, columns of A and rows of B are cut into so many parts with mixtures of their own, and A
starts √splits larger. Several tasks without task_ids are an error; one task needs none, and the batch then shares its
draw. It cannot be merged. Needs nothing of the base. skills · r (d_in + d_out) + tasks · splits · skills parameters,
r (d_in + d_out) multiply-accumulates per token and skills times as many per row of the batch.

Ponti, Sordoni, Bengio, Reddy: Combining Modular Skills in Multitask Learning, 2022, arXiv:2202.13914; splits: Caccia,
Ponti, Su, Pereira, Le Roux, Sordoni: Multi-Head Adapter Routing, 2022 (NeurIPS 2023), arXiv:2211.03831.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_lite_core import ConfigError, ModelStateError, ParamSpec, RankConfig, TargetError, hookimpl

from . import _peft_poly

LAYERS = ("linear", "convolution")
BENCH = {"lr": 2e-2}


@dataclass(frozen=True, kw_only=True)
class PolyConfig(RankConfig):
    """Config of Poly; r is the rank of each skill.

    tasks   how many tasks there are
    skills  how many LoRAs a layer has
    splits  parts of input and output with mixtures of their own; it divides both widths
    """

    variant = "poly"

    tasks: int = 1
    skills: int = 4
    splits: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tasks", "skills", "splits"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ConfigError(f"PolyConfig({name}={value!r}): it is a whole number of at least 1")


Config = PolyConfig
to_peft, from_peft = hookimpl(_peft_poly.to_peft), hookimpl(_peft_poly.from_peft)


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: PolyConfig) -> dict[str, ParamSpec]:
    if d_in % cfg.splits or d_out % cfg.splits:
        raise TargetError(f"PolyConfig(splits={cfg.splits}) on a layer {d_in} → {d_out}: splits divides both")

    def uniform(bound: float) -> Any:
        return lambda tensor, generator: tensor.uniform_(-bound, bound, generator=generator)

    return {
        "lora_A": ParamSpec((cfg.skills * cfg.r, d_in), uniform((cfg.splits / d_in) ** 0.5)),
        "lora_B": ParamSpec((d_out, cfg.skills * cfg.r)),
        "lora_Z": ParamSpec((cfg.tasks, cfg.splits * cfg.skills), uniform(1e-3), doc="logits of the mixtures"),
    }


@hookimpl
def forward(
    x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: PolyConfig, training: bool, context: Mapping[str, Any]
) -> Tensor:
    ids = torch.as_tensor(context.get("task_ids", 0), device=x.device).reshape(-1)
    if cfg.tasks > 1 and context.get("task_ids") is None:
        raise ModelStateError(f"Poly has {cfg.tasks} tasks: say those of the rows, ll.context(model, task_ids=ids)")
    if len(ids) > 1 and (x.dim() < 2 or len(ids) != len(x)):
        raise ModelStateError(f"Poly: {len(ids)} task_ids for an input {tuple(x.shape)}; one for each row, or for all")
    Z = params["lora_Z"]
    logits = F.embedding(ids, Z.to(torch.promote_types(Z.dtype, torch.float32))).unflatten(-1, (cfg.splits, -1))
    shares = (
        logits + torch.logit(torch.rand_like(logits), torch.finfo(logits.dtype).eps) if training else logits
    ).sigmoid()
    shares = (shares / shares.sum(-1, keepdim=True)).to(params["lora_A"].dtype)  # (rows, splits, skills)
    A = params["lora_A"].unflatten(0, (cfg.skills, cfg.r)).unflatten(-1, (cfg.splits, -1))
    B = params["lora_B"].unflatten(0, (cfg.splits, -1)).unflatten(-1, (cfg.skills, cfg.r))
    A = torch.einsum("bqs,srqd->brqd", shares, A).flatten(2).to(x.dtype)
    B = torch.einsum("bqs,qosr->bqor", shares, B).flatten(1, 2).to(x.dtype) / cfg.r
    if len(ids) == 1:
        return F.linear(F.linear(x, A[0]), B[0]).to(y.dtype).add_(y)
    return torch.einsum("b...r,bor->b...o", torch.einsum("b...d,brd->b...r", x, A), B).to(y.dtype).add_(y)
