"""Which groups of all layers are trained on: AdaMSS's scores and their schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_lite_core import ParamSpec, Target

TRAINED, KEPT = ("lora_A", "lora_B"), ("mean", "unsure", "kept")


def buffers(count: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, ParamSpec]:
    """What the scores of `count` groups and the values of those that are left out are kept in."""
    kept = {f"{name}_{of}": ParamSpec(shapes[name], as_buffer=True) for name in TRAINED for of in KEPT}
    return {"lora_m": ParamSpec((count,), "ones", as_buffer=True, doc="1 for groups that are trained on"), **kept}


def in_force(params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A and B: of groups that are left out the values that they had then, without a gradient."""
    A, B = params["lora_A"], params["lora_B"]
    if "lora_m" not in params:
        return A, B
    on = params["lora_m"] > 0
    rows, outputs = on.repeat_interleave(len(A) // len(on))[:, None], on[params["lora_c"]][:, None]
    return torch.where(rows, A, params["lora_A_kept"]), torch.where(outputs, B, params["lora_B_kept"])


def wide(B: Tensor, groups: Tensor, count: int) -> Tensor:
    """B (d_out, r) in the columns of the outputs' groups: (d_out, count · r)."""
    own = groups[:, None] == torch.arange(count, device=groups.device)
    return (own[:, :, None] * B[:, None, :]).flatten(1)


def before_step(targets: Sequence[Target], cfg: Any, step: int) -> None:
    """Add the gradients of this step to the scores, and choose where it is time to."""
    if cfg.target is None or not cfg.begin <= step <= cfg.end:
        return
    for target in targets:
        _watch(target.params, cfg)
    if step % cfg.interval and step != cfg.end:
        return
    scores = [_scores(target.params).cpu() for target in targets]
    every = torch.cat(scores)
    left = (1 - (step - cfg.begin) / (cfg.end - cfg.begin)) ** cfg.power
    count = cfg.target + int(max(len(every) - cfg.target, 0) * left)
    chosen = torch.zeros_like(every)
    chosen[every.topk(min(count, int((every >= 0).sum()))).indices] = 1
    for target, mask in zip(targets, chosen.split([*map(len, scores)]), strict=True):
        for name, values in zip(TRAINED, in_force(target.params), strict=True):
            target.params[f"{name}_kept"].copy_(values)
            target.params[f"{name}_mean"].zero_()
            target.params[f"{name}_unsure"].zero_()
        target.params["lora_m"].copy_(mask)


def _watch(params: Mapping[str, Tensor], cfg: Any) -> None:
    for name in TRAINED:
        w, mean, unsure = params[name], params[f"{name}_mean"], params[f"{name}_unsure"]
        if w.grad is not None:
            importance = (w * w.grad).abs()
            unsure.lerp_((importance - mean).abs(), 1 - cfg.beta2)
            mean.lerp_(importance, 1 - cfg.beta1)


def _scores(params: Mapping[str, Tensor]) -> Tensor:
    """Of each group, the mean over the entries of A and that over those of B; −1 of one that has been left out."""
    m, groups = params["lora_m"], params["lora_c"]
    count = len(m)
    A, B = (params[f"{name}_mean"].float() * params[f"{name}_unsure"].float() for name in TRAINED)
    ranks = params["lora_A"].ne(0).any(1).view(count, -1).sum(1).clamp_min(1)
    of_A = A.view(count, -1).sum(1) / (ranks * A.shape[1])
    of_B = A.new_zeros(count).index_add(0, groups, B.sum(1)) / (ranks * groups.bincount(minlength=count).clamp_min(1))
    return torch.where(m > 0, of_A + of_B, -1.0)
