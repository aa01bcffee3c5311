"""HiRA: the weight is multiplied, entry by entry, by one plus a low-rank matrix; the update has full rank.

    W' = W + W ⊙ (B A),   y = W x + b + (W ⊙ (B A)) x

A (r, d_in) starts as U(±1/√d_in), B (d_out, r) as zeros, which makes step 0 the identity. Takes the dense weight of the
base in every forward; what is trained is relative to it and was made of nothing in it, so that a file may go on another
base, as LoRA's may. r (d_in + d_out) parameters, d_in d_out multiply-accumulates per token and as many × r per call.

Huang, Ko, Zhuang, Liu, Zhang: HiRA: Parameter-Efficient Hadamard High-Rank Adaptation, 2025 (ICLR); no arXiv id,
https://openreview.net/forum?id=TwJrTz9cRS.
"""

from dataclasses import dataclass

from torch.nn import functional as F

from lora_lite_core import ParamSpec, RankConfig, dense_weight, hookimpl

BENCH = {"lr": 4e-2}


@dataclass(frozen=True, kw_only=True)
class HiRAConfig(RankConfig):
    variant = "hira"


Config = HiRAConfig


@hookimpl
def param_specs(d_in, d_out, cfg):
    return {"lora_A": ParamSpec((cfg.r, d_in), "kaiming_uniform"), "lora_B": ParamSpec((d_out, cfg.r))}


@hookimpl
def forward(x, y, params, layer):
    A, B = (params[name].to(x.dtype) for name in ("lora_A", "lora_B"))
    return y + F.linear(x, dense_weight(layer).to(x.dtype) * (B @ A)).to(y.dtype)
