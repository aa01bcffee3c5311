"""SHiRA: few entries of the weight are trained, at random places.

    y = W x + b + ΔW x,   ΔW zero but for r (d_in + d_out) entries

As many entries as LoRA of rank r has parameters, drawn once for each layer; their changes start as zeros, which makes
step 0 the identity. The change is sparse and of high rank. Needs nothing of the base. The places are saved, 8 bytes
each. r (d_in + d_out) multiply-accumulates per token on a processor in float32, else d_in d_out.

Bhardwaj et al.: Sparse High Rank Adapters, 2024 (NeurIPS), arXiv:2406.13175; here with the random mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lite_core import ParamSpec, RankConfig, TargetError, hookimpl, sparse_delta

from . import _peft

BENCH = {"lr": 1e-2}
LAYERS = ("linear", "convolution", "experts")


@dataclass(frozen=True, kw_only=True)
class SHiRAConfig(RankConfig):
    """Config of SHiRA. r (d_in + d_out) is the number of entries; it does not limit the rank."""

    variant = "shira"


Config = SHiRAConfig
to_peft, from_peft = hookimpl(_peft.shira_to_peft), hookimpl(_peft.shira_from_peft)


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: SHiRAConfig) -> dict[str, ParamSpec]:
    count, total = cfg.r * (d_in + d_out), d_in * d_out
    if count > total:
        raise TargetError(
            f"SHiRAConfig(r={cfg.r}) on a layer {d_in} → {d_out}: {count:,} entries of {total:,}; "
            f"r is at most {total // (d_in + d_out)}"
        )

    def choose(tensor: Tensor, generator: torch.Generator) -> None:
        if 4 * count > total:
            places = torch.randperm(total, generator=generator)
        else:  # the same without an order of all entries
            drawn = torch.randint(total, (2 * count,), generator=generator).unique()
            places = drawn[torch.randperm(len(drawn), generator=generator)]
        tensor.copy_(places[:count].sort().values)

    return {
        "lora_places": ParamSpec((count,), choose, trainable=False, dtype=torch.int64, doc="row · d_in + column"),
        "lora_values": ParamSpec((count,), doc="changes of these entries"),
    }


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor]) -> Tensor:
    return sparse_delta(x, params["lora_places"], params["lora_values"], y.shape[-1]).to(y.dtype).add_(y)
