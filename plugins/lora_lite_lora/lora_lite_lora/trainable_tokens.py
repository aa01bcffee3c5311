"""Trainable tokens: some rows of an embedding, and of the head that is tied to it, are trained alone.

    e(rows[k]) = E₀[k] + Δ[k],   logits[rows[k]] = (E₀[k] + Δ[k])·h where the head's weight is the embedding's

E₀ (rows, width) are the rows at attach, frozen and saved, so that a file holds for bases whose new rows were drawn
anew; Δ starts as zeros, hence the identity at step 0. Both are one tensor for the embedding and the heads tied to it,
which stay tied. On any other linear layer, rows are those of its weight. rows · width parameters, and as many frozen
numbers; on an embedding no multiply-accumulates, on a head or another linear layer rows · width per token. The peft
package has it as TrainableTokensConfig, and beside LoRA as `trainable_token_indices`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lite_core import AdapterConfig, ConfigError, ParamSpec, Target, TargetError, hookimpl, sketch

from . import _peft_tokens
from ._peft_tokens import rows_of

EMBEDDINGS = r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|shared)$"
HEADS = r"(^|\.)(lm_head|embed_out|output|decoder)$"


@dataclass(frozen=True, kw_only=True)
class TrainableTokensConfig(AdapterConfig):
    """Config of trainable tokens.

    rows          ids of the tokens to train, as those that `tokenizer.add_tokens` has made
    tied          leave out layers whose weight is not the embedding's; False gives every layer rows of its own
    target_names  by default the usual names of token embeddings and of heads, of which exclude_names leaves out none
    """

    variant = "trainable_tokens"

    rows: tuple[int, ...] = ()
    tied: bool = True
    target_names: tuple[str, ...] = (f"{EMBEDDINGS}|{HEADS}",)
    exclude_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        r = self.rows if isinstance(self.rows, (tuple, list)) else ()
        if not r or len({*r}) < len(r) or not all(type(i) is int and i >= 0 for i in r):
            raise ConfigError(f"TrainableTokensConfig(rows={self.rows!r}): give the tokens' ids, each once, as (7, 9)")


Config = TrainableTokensConfig
LAYERS = ("linear", "embedding")
to_peft, from_peft = hookimpl(_peft_tokens.to_peft), hookimpl(_peft_tokens.from_peft)


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: TrainableTokensConfig, layer: nn.Module, name: str) -> dict[str, ParamSpec]:
    table = isinstance(layer, nn.Embedding)
    count, width = (d_in, d_out) if table else (d_out, d_in)
    if max(cfg.rows) >= count:
        raise ConfigError(f"TrainableTokensConfig(rows=(…, {max(cfg.rows)})): the layer has rows 0 to {count - 1}")
    key, shape = "rows" if cfg.tied and (table or re.search(HEADS, name)) else "", (len(cfg.rows), width)
    return {
        "lora_rows": ParamSpec(shape, shared=key, doc="offsets Δ of the chosen rows"),
        "lora_start": ParamSpec(shape, shared=key and "start", trainable=False, doc="the rows E₀ at attach"),
    }


@hookimpl
def group_init(targets: tuple[Target, ...], cfg: TrainableTokensConfig) -> None:
    tables = [target.layer.weight for target in targets if cfg.tied and isinstance(target.layer, nn.Embedding)]
    if any(table is not tables[0] for table in tables):
        raise TargetError("these embeddings are several tables; name one of them in target_names")
    for target in targets:
        if tables and getattr(target.layer, "weight", None) is not tables[0]:
            target.drop()
        else:
            target.params["lora_start"].copy_(rows_of(target.layer, list(cfg.rows)))


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: TrainableTokensConfig, layer: nn.Module) -> Tensor:
    values, ids = params["lora_start"] + params["lora_rows"], torch.tensor(cfg.rows, device=y.device)
    if not isinstance(layer, nn.Embedding):
        change = values - rows_of(layer, ids)
        return y.index_add(-1, ids, nn.functional.linear(x, change.to(x.dtype)).to(y.dtype))
    rows, order = ids.sort()
    at = torch.searchsorted(rows, x).clamp_max(len(rows) - 1)
    scale = torch.as_tensor(getattr(layer, "embed_scale", 1), device=y.device).to(y.dtype)
    return torch.where((rows[at] == x)[..., None], values[order[at]].to(y.dtype) * scale, y)


@hookimpl
def fingerprint(layer: nn.Module, cfg: TrainableTokensConfig) -> Tensor:
    """Of some of the other rows: those that are trained may have been drawn anew."""
    count = len(rows_of(layer, ...))
    rows = rows_of(layer, [i for i in range(0, count, count // 256 + 1) if i not in cfg.rows]).detach()
    return sketch(nn.Embedding.from_pretrained(rows))
