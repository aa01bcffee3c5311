"""Houlsby: a bottleneck with a nonlinearity after a block.

    h ← h + U f(D h + b) + c

h (d) is what the block returns, D (r, d) starts as U(±1/√d), U (d, r) and the biases b (r), c (d) as zeros: U = 0 and
c = 0 make step 0 the identity. All are trained; f is GELU, ReLU or SiLU. Not affine in h: it cannot be merged. It goes
on the model's blocks; the paper puts one after attention and one after the feed-forward part, before each is added to
the residual stream: target_names=("self_attn$", "mlp$") where they are called so. Needs nothing of the base. 2 r d + r
+ d parameters and 2 r d multiply-accumulates per token.

Houlsby, Giurgiu, Jastrzebski, Morrone, de Laroussilhe, Gesmundo, Attariyan, Gelly: Parameter-Efficient Transfer
Learning for NLP, 2019 (ICML), arXiv:1902.00751.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from lora_lite_core import ConfigError, ParamSpec, RankConfig, hookimpl

LAYERS = ("block",)
AFFINE = False
BENCH = {"lr": 1e-2}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


@dataclass(frozen=True, kw_only=True)
class HoulsbyConfig(RankConfig):
    """Config of Houlsby adapters; r is the width of the bottleneck.

    activation  f: "gelu", "relu" or "silu"
    """

    variant = "houlsby"

    activation: str = "gelu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in ACTIVATIONS:
            known = ", ".join(map(repr, ACTIVATIONS))
            raise ConfigError(f"HoulsbyConfig(activation={self.activation!r}): it is one of {known}")


Config = HoulsbyConfig


@hookimpl
def param_specs(d_out: int, cfg: HoulsbyConfig) -> dict[str, ParamSpec]:
    return {
        "lora_D": ParamSpec((cfg.r, d_out), "kaiming_uniform", doc="into the bottleneck"),
        "lora_b": ParamSpec((cfg.r,), doc="its bias"),
        "lora_U": ParamSpec((d_out, cfg.r), doc="out of the bottleneck"),
        "lora_c": ParamSpec((d_out,), doc="its bias"),
    }


@hookimpl
def forward(y: Tensor, params: dict[str, Tensor], cfg: HoulsbyConfig) -> Tensor:
    D, b, U, c = (params[name].to(y.dtype) for name in ("lora_D", "lora_b", "lora_U", "lora_c"))
    hidden = ACTIVATIONS[cfg.activation](F.linear(y, D, b))
    return F.linear(hidden, U, c).to(y.dtype).add_(y)
