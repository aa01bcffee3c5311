"""RandLoRA: a full-rank update as a sum of frozen random products of low rank, with trained diagonals between them.

    y = W x + b + s · Σ_j B_j Λ_j A Γ_j x,   j < n = ⌈m / r⌉,   m = min(d_in, d_out),   s = alpha / r

A (r, m) and the n matrices of B (M, n, r), M = max(d_in, d_out), are random with variance 1, frozen, and shared by the
layers of a size; where d_out < d_in the sum is transposed. Λ (n, r) starts as zeros, which makes step 0 the identity,
Γ (n, m) as 1/m and is trained as an offset from it. Needs nothing of the base. n (r + m) parameters a layer; the file
holds B once for each size, which is as large as a weight.

Albert, Zhang, Saratchandran, Rodriguez-Opazo, van den Hengel, Abbasnejad: RandLoRA, 2025 (ICLR), arXiv:2502.00987.
"""

from dataclasses import dataclass

from torch.nn import functional as F

from lora_lite_core import LowRankConfig, ParamSpec, hookimpl

BENCH = {"lr": 1e-2}


@dataclass(frozen=True, kw_only=True)
class RandLoRAConfig(LowRankConfig):
    variant = "randlora"


Config = RandLoRAConfig


def _random(tensor, generator):
    tensor.uniform_(-(3**0.5), 3**0.5, generator=generator)


@hookimpl
def param_specs(d_in, d_out, cfg):
    m, M = sorted((d_in, d_out))
    n = -(-m // cfg.r)
    return {
        "lora_A": ParamSpec((cfg.r, m), _random, trainable=False, shared="A"),
        "lora_B": ParamSpec((M, n, cfg.r), _random, trainable=False, shared="B"),
        "lora_l": ParamSpec((n, cfg.r), doc="Λ"),
        "lora_g": ParamSpec((n, m), doc="offset of Γ from 1/m"),
    }


@hookimpl
def forward(x, y, params, cfg):
    A, B, l, g = (params[name].to(x.dtype) for name in ("lora_A", "lora_B", "lora_l", "lora_g"))
    small = l.unsqueeze(2) * A * (g + 1 / A.shape[1]).unsqueeze(1)  # (n, r, m), row j r + i being row i of Λ_j A Γ_j
    small, large = small.flatten(0, 1), B.flatten(1)
    if x.shape[-1] > y.shape[-1]:
        small, large = large.T, small.T
    return y + (F.linear(F.linear(x, small), large) * cfg.scale).to(y.dtype)
