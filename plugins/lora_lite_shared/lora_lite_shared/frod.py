"""FRoD: the weight in a basis that all layers of a kind share, where its diagonal and a few sparse entries are trained.

    published   y = U (Λ + S) Vᵀ x + b,   W = U Λ₀ Vᵀ
    here        y = W (x + V⁻ᵀ Λ₀⁻¹ (S + δ) Vᵀ x) + b,   Λ = Λ₀ + δ

V (d_in, d_in) comes from the weights of all layers of a kind together (same two last parts of the name), U Λ₀ is W V⁻ᵀ,
with columns of norm 1 in U. The diagonal δ (d_in) and the entries of S at fixed random places, a share `sparsity` of
d_in² that all layers of a kind have in common, are trained from zero, which makes step 0 the identity. The two lines
are equal, but U, as large as the weight in every layer, is not needed here, and the frozen layer may be quantised.
Reads the dense weights once, at attach; a file only fits the weights it was made on, and holds V and V⁻ᵀ once a kind.
d_in + sparsity d_in² parameters a layer, (2 + sparsity) d_in² multiply-accumulates per token on a processor in
float32, else 3 d_in².

Wan, Chen, Feng, Zhou, Xu: FRoD: Full-Rank Efficient Fine-Tuning with Rotational Degrees for Fast Convergence, 2025
(AAAI 2026), arXiv:2512.23485.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lite_core import AdapterConfig, ConfigError, ParamSpec, Target, dense_weight, hookimpl, sketch, sparse_delta

from . import _peft_frod
from ._frod import basis_of, category, inverse_norms, positions

BENCH = {"lr": 1e-2}
LAYERS = ("linear", "convolution")


@dataclass(frozen=True, kw_only=True)
class FRoDConfig(AdapterConfig):
    """Config of FRoD.

    sparsity  share of the d_in² entries of S that are trained, beside the diagonal
    ridge     added to the layers' Gram matrices before they are inverted for V
    """

    variant = "frod"

    sparsity: float = 0.01
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sparsity <= 1:
            raise ConfigError(f"FRoDConfig(sparsity={self.sparsity!r}): a share above 0 and at most 1")
        if not self.ridge > 0:
            raise ConfigError(f"FRoDConfig(ridge={self.ridge!r}): a number above 0")


Config = FRoDConfig
to_peft, from_peft = hookimpl(_peft_frod.frod_to_peft), hookimpl(_peft_frod.frod_from_peft)


@hookimpl
def param_specs(d_in: int, cfg: FRoDConfig, name: str) -> dict[str, ParamSpec]:
    kind, count = category(name), max(1, min(int(d_in * d_in * cfg.sparsity), d_in * (d_in - 1)))
    return {
        "lora_V": ParamSpec((d_in, d_in), trainable=False, shared=f"V_{kind}"),
        "lora_T": ParamSpec((d_in, d_in), trainable=False, shared=f"T_{kind}", doc="the inverse of V, transposed"),
        "lora_at": ParamSpec(
            (count,), positions(d_in), False, dtype=torch.int64, shared=f"at_{kind}", doc="row · d_in + column in S"
        ),
        "lora_w": ParamSpec((d_in,), "ones", trainable=False, doc="1/Λ₀, 0 where Λ₀ is"),
        "lora_l": ParamSpec((d_in,), doc="δ"),
        "lora_s": ParamSpec((count,), doc="the entries of S"),
    }


@hookimpl
def group_init(targets: tuple[Target, ...], cfg: FRoDConfig) -> None:
    kinds: dict[tuple[str, int], list[Target]] = {}
    for target in targets:
        kinds.setdefault((category(target.name), target.d_in), []).append(target)
    for members in kinds.values():
        V, T = basis_of([target.layer for target in members], cfg.ridge)
        for target in members:
            target.params["lora_V"].copy_(V)  # one for all of them, or for those of a device
            target.params["lora_T"].copy_(T)
            target.params["lora_w"].copy_(inverse_norms(dense_weight(target.layer).to(T) @ T))


@hookimpl
def forward_input(x: Tensor, params: dict[str, Tensor]) -> Tensor:
    V, T, w, l, s = (params[f"lora_{name}"] for name in "VTwls")
    turned, at, d_in = F.linear(x, V.T.to(x.dtype)), params["lora_at"], len(w)
    change = torch.addcmul(sparse_delta(turned, at, s * w[at // d_in], d_in), turned, (w * l).to(turned.dtype))
    return F.linear(change, T.to(change.dtype)).to(x.dtype).add_(x)


@hookimpl
def fingerprint(layer: nn.Module) -> Tensor:
    return sketch(layer)
