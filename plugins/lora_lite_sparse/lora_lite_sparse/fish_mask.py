"""FISH Mask: the entries of the weights with the largest Fisher information are trained.

    y = W x + b + ΔW x,   ΔW zero but where F = mean over batches of (∂ loss / ∂ W)² is among the largest

Of all layers together the share of the entries with the largest F is chosen; a layer that gets none is left out. F is
the diagonal of the empirical Fisher information where a calibration batch is one example with its labels, as in the
paper; larger batches are faster and coarser. Where the model's output holds no loss, its mean square stands in its
place. The changes start as zeros, which makes step 0 the identity. Reads gradients of the frozen weights once, at
attach, with as much memory as these weights in float32. Which entries they are is saved, 8 bytes each, and a file
fits the weights it was made on. One multiply-accumulate per entry and token on a processor in float32, else d_in d_out.

Sung, Nair, Raffel: Training Neural Networks with Fixed Sparse Masks, 2021 (NeurIPS), arXiv:2111.09839.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite_core import AdapterConfig, ConfigError, ParamSpec, Target, hookimpl, sketch, sparse_delta

from ._fisher import fisher_information

BENCH = {"lr": 5e-2}
LAYERS = ("linear", "convolution")


@dataclass(frozen=True, kw_only=True)
class FishMaskConfig(AdapterConfig):
    """Config of FISH Mask.

    share  of the entries of all layers together that is trained, above 0 and at most 1
    count  so many of every layer instead; in a layer's own config, how many it has got
    """

    variant = "fish_mask"

    share: float = 0.005
    count: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1 or (self.count is not None and self.count < 1):
            given = f"FishMaskConfig(share={self.share!r}, count={self.count!r})"
            raise ConfigError(f"{given}: a share above 0 and at most 1, and a count of at least 1 or None")


Config = FishMaskConfig


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: FishMaskConfig) -> dict[str, ParamSpec]:
    count = min(cfg.count or max(1, round(cfg.share * d_in * d_out)), d_in * d_out)
    return {
        "lora_places": ParamSpec((count,), trainable=False, dtype=torch.int64, doc="row · d_in + column"),
        "lora_values": ParamSpec((count,), doc="changes of these entries"),
    }


@hookimpl
def group_init(model: nn.Module, targets: tuple[Target, ...], cfg: FishMaskConfig, calibration_data: Any) -> None:
    flat = [F.flatten().cpu() for F in fisher_information(model, targets, calibration_data)]
    if cfg.count is None:
        together = torch.cat(flat)
        chosen = torch.zeros(len(together), dtype=torch.bool)
        chosen[together.topk(max(1, round(cfg.share * len(together)))).indices] = True
        places = [part.nonzero()[:, 0] for part in chosen.split([len(F) for F in flat])]
    else:
        places = [F.topk(min(cfg.count, len(F))).indices.sort().values for F in flat]
    for target, own in zip(targets, places, strict=True):
        if len(own):
            target.reconfigure(count=len(own))
            target.params["lora_places"].copy_(own)
        else:
            target.drop()


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor]) -> Tensor:
    return sparse_delta(x, params["lora_places"], params["lora_values"], y.shape[-1]).to(y.dtype).add_(y)


@hookimpl
def fingerprint(layer: nn.Module) -> Tensor:
    return sketch(layer)
