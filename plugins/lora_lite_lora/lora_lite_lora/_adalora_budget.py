"""Which triplets of all layers stay: AdaLoRA's scores and its budget. A config's `problem` is one of its schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_lite_core import Target

TRAINED = ("lora_P", "lora_l", "lora_Q")


def problem(cfg: Any) -> str:
    """What makes no sense in the fields, as the rest of a message; "" where nothing does."""
    if not (min(cfg.tinit, cfg.tfinal) >= 0 and cfg.interval >= 1 and cfg.tinit + cfg.tfinal < cfg.total_step):
        given = ", ".join(f"{name}={getattr(cfg, name)!r}" for name in ("tinit", "tfinal", "total_step", "interval"))
        return f"{given}): ranks are chosen from step tinit to total_step − tfinal, at every interval-th, at least 1"
    for name in ("beta1", "beta2"):
        if not 0 < getattr(cfg, name) < 1:
            return f"{name}={getattr(cfg, name)!r}): the share of the old mean is between 0 and 1"
    if cfg.target_r is not None and (cfg.target_r < 1 or (cfg.target_r > cfg.r and not cfg.rank_pattern)):
        return f"target_r={cfg.target_r!r}, r={cfg.r}): ranks only get smaller; from 1 to r"
    if not cfg.orth_reg_weight >= 0:
        return f"orth_reg_weight={cfg.orth_reg_weight!r}): a weight is a number from 0"
    return ""


def budget(targets: Sequence[Target], cfg: Any, step: int) -> int:
    """How many triplets of all layers stay."""
    first = sum(target.params["lora_l"].numel() for target in targets)
    ranks = [target.params["lora_l"].numel() for target in targets]
    last = sum(-(-2 * r // 3) if cfg.target_r is None else min(cfg.target_r, r) for r in ranks)
    left = 1 - (step - cfg.tinit) / (cfg.total_step - cfg.tfinal - cfg.tinit)
    return last + int((first - last) * min(max(left, 0), 1) ** 3)


@torch.no_grad()
def choose(targets: Sequence[Target], cfg: Any, step: int) -> None:
    """Add the gradients of this step to the scores, and choose where it is time to."""
    end = cfg.total_step - cfg.tfinal
    if step > end:
        return
    for target in targets:
        _watch(target.params, cfg)
    if step <= cfg.tinit or (step % cfg.interval and step != end):
        for target in targets:
            target.params["lora_m"].fill_(1)
        return
    scores = [_score(target.params).cpu() for target in targets]
    chosen = torch.zeros(sum(map(len, scores)))
    chosen[torch.cat(scores).topk(budget(targets, cfg, step)).indices] = 1
    for target, mask in zip(targets, chosen.split([*map(len, scores)]), strict=True):
        target.params["lora_m"].copy_(mask)


def _watch(params: Any, cfg: Any) -> None:
    for name in TRAINED:
        w, mean, unsure = params[name], params[f"{name}_mean"], params[f"{name}_unsure"]
        if w.grad is not None:
            sensitivity = (w * w.grad).abs()
            mean.lerp_(sensitivity, 1 - cfg.beta1)
            unsure.lerp_((sensitivity - mean).abs(), 1 - cfg.beta2)


def _score(params: Any) -> Tensor:
    P, l, Q = (params[f"{name}_mean"].float() * params[f"{name}_unsure"].float() for name in TRAINED)
    return P.mean(0) + l + Q.mean(1)
