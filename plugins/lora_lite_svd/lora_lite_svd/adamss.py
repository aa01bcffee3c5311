"""AdaMSS: a small LoRA for each group of similar rows of the weight, all behind its first right singular vectors.

    y_j = (W x + b)_j + B_j A_c(j) (V x + v),    [V v] (dims, d_in + 1) right singular vectors of [W b] = U S [V v]

The rows of U (d_out, dims) are put into groups by k-means; c(j) is that of output j. A_c (r, dims) starts as the first
right singular vectors of its rows of U, B_j (r), row j of lora_B, as zeros, which makes step 0 the identity; both are
trained, V and v are frozen, and v is there where the layer has a bias. lora_A holds the A_c one below the other; groups
of fewer than r rows leave the rest at zero. With `target`, groups of little use stay as they are, for good, and the
others are trained on: the score is the smoothed importance |w ∂w| times its uncertainty, a mean over A_c and one over
its B_j, since `begin` or the last choice; at each interval-th step and at `end` the best of all layers are chosen, by a
curve down to `target` of them. That needs `ll.follow(model, optimizer)`; the peft package keeps one fewer each time, as
none is above itself. Reads weight and bias at attach; a file only fits those. subspaces · r · dims + r d_out parameters
(with `target` three times as many numbers in the file beside), subspaces · r (d_in + d_out) multiply-accumulates per
token, and subspaces · r · dims · d_in per call, for A V.

Zheng et al.: AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning, 2025 (NeurIPS), OpenReview
8ZdWmpYxT0. PEFT's folders do not say which outputs are a group: they are found anew, which takes scikit-learn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lite_core import ParamSpec, TargetError, hookimpl, project, sketch

from . import _allocation, _peft_adamss, _subspaces
from ._adamss_config import AllocationConfig, not_whole

BENCH = {"lr": 3e-2}


@dataclass(frozen=True, kw_only=True)
class AdaMSSConfig(AllocationConfig):
    """Config of AdaMSS; r is the rank of each group.

    subspaces     how many groups of rows a layer has
    dims          how many singular vectors they are made of, at most as many as there are
    threshold     leaves out directions of a group whose squared singular value is a smaller share of its largest
    like_peft     groups as the peft package finds them, by scikit-learn, so that export_peft can write them
    """

    variant = "adamss"

    r: int = 1
    subspaces: int = 5
    dims: int = 100
    threshold: float = 0.0
    like_peft: bool = False

    def problem(self) -> str:
        wrong = not_whole(self, "subspaces", "dims") or super().problem()
        return wrong if 0 <= self.threshold < 1 else f"threshold={self.threshold!r}): a share from 0 to below 1"


Config = AdaMSSConfig
to_peft, from_peft = hookimpl(_peft_adamss.to_peft), hookimpl(_peft_adamss.from_peft)
before_step = hookimpl(_allocation.before_step)


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: AdaMSSConfig, layer: nn.Module) -> dict[str, ParamSpec]:
    bias = getattr(layer, "bias", None) is not None
    dims, count = min(cfg.dims, d_out, d_in + bias), min(cfg.subspaces, d_out)
    if cfg.r > dims:
        raise TargetError(f"AdaMSSConfig(r={cfg.r}) on a layer {d_in} → {d_out}: r is at most {dims}")
    shapes = {"lora_A": (count * cfg.r, dims), "lora_B": (d_out, cfg.r)}
    frozen = {"lora_V": (dims, d_in), **({"lora_v": (dims,)} if bias else {})}
    specs = {name: ParamSpec(shape, trainable=name in shapes) for name, shape in (frozen | shapes).items()}
    specs["lora_c"] = ParamSpec((d_out,), trainable=False, dtype=torch.int64, doc="group of each output")
    return specs if cfg.target is None else specs | _allocation.buffers(count, shapes)


@hookimpl
def init(layer: nn.Module, params: dict[str, Tensor], cfg: AdaMSSConfig, generator: torch.Generator) -> None:
    U, Vh = _subspaces.vectors(layer, len(params["lora_V"]))
    theirs = _peft_adamss.groups_of_peft(layer, len(Vh), cfg.subspaces) if cfg.like_peft else None
    groups = _subspaces.k_means(U, cfg.subspaces, generator) if theirs is None else theirs
    _subspaces.fill(params, cfg, U, Vh, groups)


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: AdaMSSConfig) -> Tensor:
    A, B = _allocation.in_force(params)
    B = _allocation.wide(B, params["lora_c"], len(A) // cfg.r)
    hidden = project(x, A @ params["lora_V"])
    if "lora_v" in params:
        hidden = hidden + F.linear(params["lora_v"], A).to(hidden.dtype)
    return F.linear(hidden, B.to(hidden.dtype)).to(y.dtype).add_(y)


@hookimpl
def fingerprint(layer: nn.Module) -> Tensor:
    return sketch(layer)
