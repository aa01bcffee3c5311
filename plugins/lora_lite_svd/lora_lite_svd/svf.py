"""SVF: every singular value of the weight is scaled, and nothing else is trained.

    W' = U diag(S ⊙ z) Vh = W V diag(z) Vh,   z = 1 + δ
    here   y = W (x + V (δ ⊙ Vh x)) + b   where d_in ≤ d_out,   else   y = t + U (δ ⊙ Uᵀ t) + b,   t = W x

The published form needs U and V, and the dense weight of every call; here the frozen layer keeps its product with W,
and the singular vectors of the smaller side do, V or U (m, m), m = min(d_in, d_out). δ (m) is trained from zero, which
makes step 0 the identity. Reads the base's dense weight once, at attach. The file holds the m² numbers of the vectors,
up to as many as the weight itself, because what is computed from them depends on nothing else. save_basis=False keeps δ
alone, as the paper's z-vectors are kept, and makes them anew at load, of the same base: V diag(δ) Vh does not depend on
signs, but on which of two equal singular values comes first; a layer with such ones is refused. m parameters, 2 m²
multiply-accumulates per token.

Sun, Cetin, Tang: Transformer-Squared: Self-adaptive LLMs, 2025 (ICLR), arXiv:2501.06252.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lite_core import AdapterConfig, ParamSpec, TargetError, dense_weight, hookimpl, sketch, truncated_svd

BENCH = {"lr": 5e-2}
APART = 1e-9  # singular values that are nearer, as a share of the largest, are not told apart


@dataclass(frozen=True, kw_only=True)
class SVFConfig(AdapterConfig):
    """Config of SVF.

    save_basis  the file holds the singular vectors; False makes them anew at load
    """

    variant = "svf"

    save_basis: bool = True


Config = SVFConfig


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: SVFConfig) -> dict[str, ParamSpec]:
    m = min(d_in, d_out)
    basis = ParamSpec((m, m), trainable=False, persistent=cfg.save_basis, doc="singular vectors of the smaller side")
    return {"lora_V" if d_in <= d_out else "lora_U": basis, "lora_z": ParamSpec((m,), doc="offsets δ of z from 1")}


@hookimpl
def init(layer: nn.Module, params: dict[str, Tensor], cfg: SVFConfig, name: str, generator: torch.Generator) -> None:
    weight = dense_weight(layer)
    U, S, Vh = truncated_svd(weight.double(), min(weight.shape), generator)
    near = (S[:-1] - S[1:] < APART * S[0]) & (S[:-1] > 1e-7 * S[0])
    if not cfg.save_basis and bool(near.any()):
        raise TargetError(f"{name} has singular values that are equal; SVFConfig(save_basis=True) can scale them")
    if "lora_V" in params:
        params["lora_V"].copy_(Vh)
    else:
        params["lora_U"].copy_(U.T)


def _scaled(t: Tensor, vectors: Tensor, z: Tensor) -> Tensor:
    """Σ δᵢ vᵢ (vᵢ · t) of the rows vᵢ."""
    return (F.linear(t, vectors.to(t.dtype)) * z.to(t.dtype)) @ vectors.to(t.dtype)


@hookimpl
def forward_input(x: Tensor, params: dict[str, Tensor]) -> Tensor:
    return x + _scaled(x, params["lora_V"], params["lora_z"]).to(x.dtype) if "lora_V" in params else x


@hookimpl
def forward(y: Tensor, params: dict[str, Tensor], layer: nn.Module) -> Tensor:
    if "lora_V" in params:
        return y
    bias = getattr(layer, "bias", None)
    return y + _scaled(y if bias is None else y - bias, params["lora_U"], params["lora_z"]).to(y.dtype)


@hookimpl
def fingerprint(layer: nn.Module) -> Tensor:
    return sketch(layer)
