"""EVA: LoRA whose directions start as the principal components of each layer's input on the task's data.

    y = W x + b + s · B (A x),   s = alpha / r,   rows of A (r, d_in): top eigenvectors of the inputs' covariance

B (d_out, r) starts as zeros, hence the identity at step 0; A and B are both trained. Needs calibration data and nothing
of the base's weight. The covariance is that of all tokens that are not padding, streamed, with one Gram matrix for
layers that receive the same tensor; solved in float64. With rho > 1 every layer offers its rho · r strongest
directions, and the best of all layers, by the share of their own layer's variance that they explain, get a place: ranks
differ, their sum stays, a layer without any loses its adapter, and s stays what it was. r (d_in + d_out) parameters and
multiply-accumulates per token.

Paischer, Hauzenberger, Schmied, Alkin, Deisenroth, Hochreiter: Parameter Efficient Fine-tuning via Explained Variance
Adaptation, 2024 (NeurIPS 2025), arXiv:2410.07170. The authors compute an incremental PCA instead of the covariance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lora_lite_core import (
    CalibrationError,
    ConfigError,
    DropoutConfig,
    Moments,
    ParamSpec,
    Target,
    TargetError,
    calibration_batches,
    collect_inputs,
    dropped,
    hookimpl,
    lowrank_delta,
    principal_directions,
)


@dataclass(frozen=True, kw_only=True)
class EVAConfig(DropoutConfig):
    """Config of EVA.

    rho     how many times r directions a layer may get; 1 gives every layer its r
    center  subtract the mean of the inputs, as the authors do
    """

    variant = "eva"

    rho: float = 1.0
    center: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rho < 1:
            raise ConfigError(f"EVAConfig(rho={self.rho!r}): a layer may get its own r directions; rho is from 1")


Config = EVAConfig


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: EVAConfig) -> dict[str, ParamSpec]:
    if cfg.r > d_in:
        raise TargetError(f"EVAConfig(r={cfg.r}) on a layer {d_in} → {d_out}: r is at most {d_in}")
    return {"lora_A": ParamSpec((cfg.r, d_in)), "lora_B": ParamSpec((d_out, cfg.r))}


@hookimpl
def group_init(model: nn.Module, targets: tuple[Target, ...], cfg: EVAConfig, calibration_data: Any) -> None:
    batches = calibration_batches(calibration_data, "eva")
    moments = collect_inputs(model, targets, batches, lambda target: Moments(target.d_in), shared=True)
    solved: dict[int, tuple[Tensor, Tensor]] = {}  # one solution for layers that share their statistics
    offers: dict[str, tuple[Tensor, Tensor]] = {}
    for target in targets:
        seen, wanted = moments[target.name], min(round(cfg.rho * target.cfg.r), target.d_in)
        if seen.count - cfg.center < wanted:
            raise CalibrationError(
                f"{target.name} saw {seen.count} tokens of calibration data, too few for {wanted} directions; give more"
            )
        if id(seen) not in solved or len(solved[id(seen)][0]) < wanted:
            solved[id(seen)] = principal_directions(seen.second_moment(center=cfg.center), wanted)
        shares, directions = solved[id(seen)]
        offers[target.name] = shares[:wanted], directions[:wanted]
    ranked = sorted(((float(s), t.name) for t in targets for s in offers[t.name][0]), key=lambda pair: -pair[0])
    places = [name for _, name in ranked[: sum(target.cfg.r for target in targets)]]
    for target in targets:
        r = places.count(target.name) if cfg.rho > 1 else target.cfg.r
        if r == 0:
            target.drop()
            continue
        if r != target.cfg.r:
            target.reconfigure(r=r, alpha=None if target.cfg.alpha is None else target.cfg.scale * r)
        target.params["lora_A"].copy_(offers[target.name][1][:r])


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: EVAConfig, training: bool) -> Tensor:
    return lowrank_delta(dropped(x, cfg, training), params["lora_A"], params["lora_B"], cfg.scale).to(y.dtype).add_(y)
