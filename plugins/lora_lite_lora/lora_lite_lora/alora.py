"""aLoRA: LoRA that is on from the invocation tokens of each sequence onward, and off before them.

    y_t = W x_t + b + s · [t ≥ start] · B (A x_t),    s = alpha / r

start is where the last occurrence of the invocation tokens begins in the model's `input_ids`; a sequence without any
is the base model's. What comes before is the base model's in every case, so that its key-value cache can be used. A
(r, d_in) starts as U(±1/√d_in), B (d_out, r) as zeros, which makes step 0 the identity; both are trained. Needs
nothing of the base. It cannot be merged. r (d_in + d_out) parameters and as many multiply-accumulates per token.

Generation with a cache calls the model with a part of the sequence, which does not show the invocation: say the prompt,
`with ll.context(model, prompt_ids=ids): model.generate(ids)`. Without ids of any kind it is on everywhere.

Greenewald, Lastras, Parnell, Shah, Popa, Zizzo, Gunasekara, Rawat, Cox: Activated LoRA: Fine-tuned LLMs for
Intrinsics, 2025, arXiv:2504.12397.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_lite_core import ConfigError, DropoutConfig, ModelStateError, ParamSpec, dropped, hookimpl, lowrank_delta

from . import _peft_alora

LAYERS = ("linear", "embedding")
BENCH = {"lr": 1e-2}


@dataclass(frozen=True, kw_only=True)
class ALoRAConfig(DropoutConfig):
    """Config of aLoRA.

    invocation_tokens  the token ids that switch it on, as the tokenizer makes them of the invocation text; required
    """

    variant = "alora"

    invocation_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        ids = self.invocation_tokens
        if not isinstance(ids, (tuple, list)) or not ids or not all(type(one) is int and one >= 0 for one in ids):
            raise ConfigError(f"ALoRAConfig(invocation_tokens={ids!r}): give one token id or more, as in (5, 17)")


Config = ALoRAConfig
to_peft, from_peft = hookimpl(_peft_alora.to_peft), hookimpl(_peft_alora.from_peft)


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: ALoRAConfig) -> dict[str, ParamSpec]:
    return {"lora_A": ParamSpec((cfg.r, d_in), "kaiming_uniform"), "lora_B": ParamSpec((d_out, cfg.r))}


@hookimpl
def forward(
    x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: ALoRAConfig, training: bool, context: Mapping[str, Any]
) -> Tensor:
    x = dropped(x, cfg, training)
    change = lowrank_delta(x, params["lora_A"], params["lora_B"], cfg.scale).to(y.dtype)
    ids = context.get("input_ids")
    whole = context.get("prompt_ids", ids)
    if whole is None:
        return change.add_(y)
    length = y.shape[-2] if y.dim() == 3 else (whole if ids is None else ids).shape[1]
    on = torch.arange(length, 0, -1, device=y.device) <= _from_the_end(whole, cfg.invocation_tokens)
    if on.numel() != change[..., 0].numel():
        raise ModelStateError(
            f"aLoRA: outputs {tuple(y.shape)} for tokens {tuple(on.shape)}; exclude_names such a layer"
        )
    return y + change * on.reshape(*y.shape[:-1], 1)


def _from_the_end(ids: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """(batch, 1): how many tokens there are from the start of the last invocation on; 0 where there is none."""
    length = ids.shape[1]
    padded = F.pad(ids, (0, len(tokens) - 1), value=-1)
    found = torch.stack([padded[:, i : i + length] == token for i, token in enumerate(tokens)]).all(0)
    left = torch.where(found, torch.arange(length, 0, -1, device=ids.device), length + 1)
    return left.amin(1, keepdim=True) % (length + 1)
