"""PEANuT: a small network reads the weight and gives its change.

    ΔW = s · (H Bᵀ)ᵀ,   H = net(Wᵀ) (d_in, r),   y = W x + b + s · B (Hᵀ x)

The network takes each column of W (d_out numbers, one column for each input): h = φ(A w); then `depth` encoders h ←
φ(E_i h), and as many decoders h ← φ(D_i h) + the h that its encoder got, the last first. A (r, d_out), E and D (depth,
r, r) start as U(±1/√ their inputs), B (d_out, r) as zeros, which makes step 0 the identity. Takes the dense weight of
the base in every call; a file may go on another base. 2 r d_out + 2 depth r² parameters, r (d_in + d_out)
multiply-accumulates per token and r d_in d_out + 2 depth r² d_in per call.

Zhong, Jiang, Li, Nakada, Liu, Zhang, Yao, Wang: PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural
Tweakers (first called NEAT), 2024, arXiv:2410.01870.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from lora_lite_core import ConfigError, ParamSpec, RankConfig, dense_weight, hookimpl, layer_dtype, lowrank_delta

from . import _peft_peanut
from ._activations import ACTIVATIONS

BENCH = {"lr": 1e-2}


@dataclass(frozen=True, kw_only=True)
class PEANuTConfig(RankConfig):
    """Config of PEANuT.

    depth       number of encoders, and of decoders, from 0
    activation  φ: "relu", "gelu", "gelu_tanh", "leaky_relu", "mish", "relu6", "sigmoid", "silu", "tanh" or "linear"
    scale       s, a number above 0
    """

    variant = "peanut"

    depth: int = 0
    activation: str = "relu"
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.depth, int) or self.depth < 0:
            raise ConfigError(f"PEANuTConfig(depth={self.depth!r}): give a number of encoders, from 0")
        if self.activation not in ACTIVATIONS:
            allowed = ", ".join(ACTIVATIONS)
            raise ConfigError(f"PEANuTConfig(activation={self.activation!r}): give one of {allowed}")
        if not isinstance(self.scale, (int, float)) or not self.scale > 0:
            raise ConfigError(f"PEANuTConfig(scale={self.scale!r}): the scale is a number above 0")


Config = PEANuTConfig
to_peft, from_peft = hookimpl(_peft_peanut.to_peft), hookimpl(_peft_peanut.from_peft)


@hookimpl
def param_specs(d_out: int, cfg: PEANuTConfig) -> dict[str, ParamSpec]:
    inner = ParamSpec((cfg.depth, cfg.r, cfg.r), "kaiming_uniform") if cfg.depth else None
    return {
        "lora_A": ParamSpec((cfg.r, d_out), "kaiming_uniform", doc="reads a column of the weight"),
        **({} if inner is None else {"lora_E": inner, "lora_D": inner}),
        "lora_B": ParamSpec((d_out, cfg.r)),
    }


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: PEANuTConfig, layer: nn.Module) -> Tensor:
    act = ACTIVATIONS[cfg.activation]
    dtype = x.dtype if x.is_floating_point() else layer_dtype(layer)
    p = {name: tensor.to(dtype) for name, tensor in params.items()}
    kept: list[Tensor] = []
    h = act(dense_weight(layer).to(dtype).T @ p["lora_A"].T)
    for number in range(cfg.depth):
        kept.append(h)
        h = act(F.linear(h, p["lora_E"][number]))
    for number in range(cfg.depth):
        h = act(F.linear(h, p["lora_D"][number])) + kept.pop()
    return lowrank_delta(x, h.T, p["lora_B"], cfg.scale).to(y.dtype).add_(y)
