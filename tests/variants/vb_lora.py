"""VB-LoRA: the factors of all layers are put together from one small bank of trained vectors.

    y = W x + b + B A x,   each piece of b numbers of a row of A or a column of B:   Σ_k softmax(top-K of its logits)_k v_k

The bank V (h, b) is shared and trained. Each layer has logits for A (r, d_in / b, h) and for B (d_out / b, r, h); the K
largest of h choose the vectors and, by softmax, their shares. Logits start as N(0, 0.1²), the bank as U(±0.02): B A is
small and not zero (else nothing had a gradient), not the identity. r h (d_in + d_out) / b parameters a layer, h b for all.

Li, Han, Ji: VB-LoRA, 2024 (NeurIPS), arXiv:2405.15179, equations 2 to 4.
"""

from dataclasses import dataclass

from torch.nn import functional as F

from lora_lite_core import ConfigError, ParamSpec, RankConfig, TargetError, hookimpl

BENCH = {"lr": 4e-2}
IDENTITY_ATOL = 1e-2
IDENTITY_REASON = "published start: the bank is U(±0.02), so that B A is small and not zero"


@dataclass(frozen=True, kw_only=True)
class VBLoRAConfig(RankConfig):
    variant = "vb_lora"
    num_vectors: int = 64  # h
    vector_length: int = 8  # b
    topk: int = 2  # K

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.topk <= self.num_vectors:
            raise ConfigError(f"VBLoRAConfig(topk={self.topk!r}): from 1 to num_vectors={self.num_vectors!r}")


Config = VBLoRAConfig


@hookimpl
def param_specs(d_in, d_out, cfg):
    h, b = cfg.num_vectors, cfg.vector_length
    if d_in % b or d_out % b:
        fitting = [n for n in range(1, min(d_in, d_out) + 1) if d_in % n == d_out % n == 0]
        raise TargetError(f"VBLoRAConfig(vector_length={b}) on a layer {d_in} → {d_out}: {fitting} divide both")
    return {
        "lora_bank": ParamSpec((h, b), lambda t, g: t.uniform_(-0.02, 0.02, generator=g), shared="bank"),
        "lora_logits_A": ParamSpec((cfg.r, d_in // b, h), lambda t, g: t.normal_(std=0.1, generator=g)),
        "lora_logits_B": ParamSpec((d_out // b, cfg.r, h), lambda t, g: t.normal_(std=0.1, generator=g)),
    }


def mixed(logits, bank, k):
    largest, which = logits.topk(k, dim=-1)
    return (largest.softmax(-1).unsqueeze(-1) * bank[which]).sum(-2)


@hookimpl
def forward(x, y, params, cfg):
    A, B = (mixed(params[f"lora_logits_{side}"], params["lora_bank"], cfg.topk).to(x.dtype) for side in "AB")
    return y + F.linear(F.linear(x, A.flatten(1)), B.transpose(1, 2).flatten(0, 1)).to(y.dtype)
