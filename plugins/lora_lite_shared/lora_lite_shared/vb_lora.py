"""VB-LoRA: the low-rank factors of all layers are put together from one small bank of trained vectors.

    y = W x + b + B A x,   b numbers of a row of A or of a column of B are   Σ_k softmax(top-K of their logits)_k v_k

The bank (h vectors of length b) is trained and shared by all layers. Each layer has trained logits for its pieces,
(r, d_in / b, h) and (d_out / b, r, h): the K largest of h choose the vectors and, by softmax, their shares. Logits
start as N(0, 0.1²), the bank as U(±bound): B A is small and not zero, else nothing had a gradient, so that step 0 is
near the identity and not quite. Needs nothing of the base. r h (d_in + d_out) / b parameters a layer and h b for all;
r (d_in + d_out) multiply-accumulates per token, and the choice once for each call.

Li, Han, Ji: VB-LoRA, 2024 (NeurIPS), arXiv:2405.15179, equations 2 to 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lora_lite_core import ConfigError, ParamSpec, RankConfig, TargetError, hookimpl, lowrank_delta

from ._peft import Pair, linear_only, vb_lora_from_peft

BENCH = {"lr": 4e-2}
IDENTITY_ATOL = 1e-2
IDENTITY_REASON = "published start: the bank is U(±0.02), so that B A is small and not zero"


@dataclass(frozen=True, kw_only=True)
class VBLoRAConfig(RankConfig):
    """Config of VB-LoRA.

    num_vectors    h, how many vectors the bank holds
    vector_length  b, their length, which divides d_in and d_out; None is the largest up to 256 that does: layers with
                   other lengths have a bank of their own
    topk           K, how many of them a piece is made of; 1 leaves the logits without a gradient
    bound          the bank starts as U(±bound)
    """

    variant = "vb_lora"

    r: int = 4
    num_vectors: int = 256
    vector_length: int | None = None
    topk: int = 2
    bound: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.topk <= self.num_vectors:
            raise ConfigError(f"VBLoRAConfig(topk={self.topk!r}): from 1 to num_vectors={self.num_vectors!r}")
        if self.vector_length is not None and self.vector_length < 1:
            raise ConfigError(f"VBLoRAConfig(vector_length={self.vector_length!r}): at least 1, or None")
        if not self.bound > 0:
            raise ConfigError(f"VBLoRAConfig(bound={self.bound!r}): a bank of zeros has no gradient; above 0")


Config = VBLoRAConfig


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: VBLoRAConfig) -> dict[str, ParamSpec]:
    fitting = [n for n in range(1, min(d_in, d_out) + 1) if d_in % n == d_out % n == 0]
    h, b = cfg.num_vectors, cfg.vector_length or max(n for n in fitting if n <= 256)
    if b not in fitting:
        raise TargetError(f"VBLoRAConfig(vector_length={b}) on a layer {d_in} → {d_out}: {fitting} divide both")
    return {
        "lora_bank": ParamSpec((h, b), lambda t, g: t.uniform_(-cfg.bound, cfg.bound, generator=g), shared="bank"),
        "lora_logits_A": ParamSpec((cfg.r, d_in // b, h), lambda t, g: t.normal_(std=0.1, generator=g)),
        "lora_logits_B": ParamSpec((d_out // b, cfg.r, h), lambda t, g: t.normal_(std=0.1, generator=g)),
    }


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: VBLoRAConfig) -> Tensor:
    A, B = (_mixed(params[f"lora_logits_{side}"], params["lora_bank"], cfg.topk) for side in "AB")
    return lowrank_delta(x, A.flatten(1), B.transpose(1, 2).flatten(0, 1)).to(y.dtype).add_(y)


def _mixed(logits: Tensor, bank: Tensor, k: int) -> Tensor:
    """(..., h) → (..., b)."""
    largest, which = logits.topk(k, dim=-1)
    return (largest.softmax(-1).unsqueeze(-2) @ F.embedding(which, bank)).squeeze(-2)


@hookimpl
def to_peft(params: dict[str, Tensor], cfg: VBLoRAConfig, layer: nn.Module) -> Pair:
    linear_only(layer, "VB-LoRA")
    h, b = params["lora_bank"].shape
    fields = {"peft_type": "VBLORA", "r": cfg.r, "num_vectors": h, "vector_length": b, "topk": cfg.topk}
    own = {f"vblora_logits_{side}": params[f"lora_logits_{side}"] for side in "AB"}
    return {**fields, "bias": "none"}, {**own, "base_model.vblora_vector_bank": params["lora_bank"]}


@hookimpl
def from_peft(config: dict[str, Any], tensors: dict[str, Tensor]) -> Pair | None:
    return vb_lora_from_peft(config, tensors) if config["peft_type"] == "VBLORA" else None
