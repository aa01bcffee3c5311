"""OSF: all of the weight but its largest singular triplets is trained, in directions orthogonal to those.

    published  W' = U_k S_k V_k + U S V,   the k largest triplets frozen, the others (U, S, V) trained
    here       y = W x + b + dU ((S0 + dS) ⊙ h) + U0 (dS ⊙ h + S0 ⊙ dV x),   h = (V0 + dV) x
    before a step   g_U ← (I − U_k U_kᵀ) g_U,   g_V ← g_V (I − V_kᵀ V_k)

U0 (d_out, n), S0 (n), V0 (n, d_in) are the n = min(d_in, d_out) − k smaller triplets, frozen; the offsets dU, dS, dV
are trained from zero, and each term of the change has one of them, which makes step 0 the identity. Gradients are
projected before every step of an optimizer that `ll.follow` was given; under SGD the kept triplets stay: W' V_kᵀ = U_k
S_k, U_kᵀ W' = S_k V_k. Adam gives each entry a step size of its own, so that they move, a third to a half as much as
without; so it is in the peft package, which clips norms of projected gradients, where here they are projected after.
Reads the dense weight at attach; a file only fits the weights it was made on. n (d_in + d_out + 1) parameters, as many
as a square weight has where n is half of it, and 2 n (d_in + d_out) multiply-accumulates per token.

Nayak, Killamsetty, Han, Bhandwaldar, Chanda, Xu, Wang, Pareja, Silkin, Eyceoz, Srivastava: Sculpting Subspaces:
Constrained Full Fine-Tuning in LLMs for Continual Learning, 2025, arXiv:2504.07097.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lite_core import AdapterConfig, ConfigError, ParamSpec, Target, TargetError, hookimpl, project, sketch

from . import _peft_osf
from ._lower_triplets import clear_gradients, lower_triplets

BENCH = {"lr": 3e-3}


@dataclass(frozen=True, kw_only=True)
class OSFConfig(AdapterConfig):
    """Config of OSF.

    keep  how many of the largest singular triplets stay as they are: a number, or a share of all of them below 1
    """

    variant = "osf"

    keep: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.keep) not in (int, float) or not (0 < self.keep < 1 or (self.keep >= 1 and self.keep % 1 == 0)):
            raise ConfigError(
                f"OSFConfig(keep={self.keep!r}): a whole number of at least 1, or a share between 0 and 1"
            )

    def kept(self, d_in: int, d_out: int) -> int:
        """How many triplets stay of a layer."""
        m = min(d_in, d_out)
        if not 1 <= (k := int(m * self.keep if self.keep < 1 else self.keep)) < m:
            raise TargetError(f"OSFConfig(keep={self.keep}) on a layer {d_in} → {d_out}: it keeps {k} of {m} triplets")
        return k


Config = OSFConfig
to_peft, from_peft = hookimpl(_peft_osf.to_peft), hookimpl(_peft_osf.from_peft)


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: OSFConfig) -> dict[str, ParamSpec]:
    n = min(d_in, d_out) - (k := cfg.kept(d_in, d_out))
    shapes = {"U": (d_out, n), "S": (n,), "V": (n, d_in)}
    specs = {f"lora_{key}0": ParamSpec(shape, trainable=False) for key, shape in shapes.items()}
    if d_in != d_out:  # kept directions of the longer side; on the other they are all that the smaller ones leave
        name, shape = ("Uk", (d_out, k)) if d_out > d_in else ("Vk", (k, d_in))
        specs[f"lora_{name}"] = ParamSpec(shape, trainable=False, doc="gradients are cleared of them")
    return specs | {f"lora_d{key}": ParamSpec(shape, doc=f"offset of {key}0") for key, shape in shapes.items()}


@hookimpl
def init(layer: nn.Module, params: dict[str, Tensor], generator: torch.Generator) -> None:
    for name, value in lower_triplets(layer, len(params["lora_S0"]), generator).items():
        params[name].copy_(value)


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor]) -> Tensor:
    dh = project(x, params["lora_dV"])
    h = project(x, params["lora_V0"]) + dh
    U0, S0, dU, dS = (params[f"lora_{name}"].to(h.dtype) for name in ("U0", "S0", "dU", "dS"))
    return F.linear((S0 + dS) * h, dU).add_(F.linear(torch.addcmul(S0 * dh, dS, h), U0)).to(y.dtype).add_(y)


@hookimpl
def before_step(targets: Sequence[Target]) -> None:
    for target in targets:
        clear_gradients(target.params)


@hookimpl
def fingerprint(layer: nn.Module) -> Tensor:
    return sketch(layer)
