"""aLoRA: LoRA that is on from the invocation tokens of each sequence onward, and off before them.

    y_t = W x_t + b + s · [t ≥ start] · B (A x_t),    s = alpha / r

start is where the last occurrence of the invocation tokens begins in the model's `input_ids`; a sequence without any
is the base model's. What comes before is the base model's in every case, so that its key-value cache can be used. A
(r, d_in) starts as U(±1/√d_in), B (d_out, r) as zeros, which makes step 0 the identity; both are trained. Needs
nothing of the base. It cannot be merged. r (d_in + d_out) parameters and as many multiply-accumulates per token.

A call that gets a part of the sequence, as generation with a cache does, does not see the invocation: say the prompt,
`with ll.context(model, prompt_ids=ids): model.generate(ids)`; positions then count from its end. A model that is
called with neither has the adapter on everywhere.

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

from lora_lite_core import ConfigError, DropoutConfig, ParamSpec, dropped, hookimpl, lowrank_delta

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
    return y + change * on.reshape(*y.shape[:-1], 1)


def _from_the_end(ids: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """(batch, 1): how many tokens there are from the start of the last invocation on; 0 where there is none."""
    length = ids.shape[1]
    padded = F.pad(ids, (0, len(tokens) - 1), value=-1)
    found = torch.stack([padded[:, i : i + length] == token for i, token in enumerate(tokens)]).all(0)
    left = torch.where(found, torch.arange(length, 0, -1, device=ids.device), length + 1)
    return left.amin(1, keepdim=True) % (length + 1)


@hookimpl
def to_peft(params: dict[str, Tensor], cfg: ALoRAConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
    fields = {"peft_type": "LORA", "r": cfg.r, "lora_alpha": cfg.r if cfg.alpha is None else cfg.alpha}
    fields |= {"alora_invocation_tokens": list(cfg.invocation_tokens), "lora_dropout": cfg.dropout}
    fields |= {"rank_pattern": {}, "alpha_pattern": {}, "task_type": "CAUSAL_LM"}  # in others PEFT leaves it off
    return fields, {"lora_A.weight": params["lora_A"], "lora_B.weight": params["lora_B"]}


@hookimpl
def from_peft(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    if config["peft_type"] != "LORA" or not config.get("alora_invocation_tokens"):
        return None
    if config.get("use_rslora"):
        raise ConfigError("use_rslora=True: aLoRA is scaled by alpha / r here")
    fields = {"r": config["r"], "alpha": config["lora_alpha"], "dropout": config.get("lora_dropout") or 0.0}
    fields["invocation_tokens"] = tuple(config["alora_invocation_tokens"])
    return fields, {"lora_A": tensors["lora_A.weight"], "lora_B": tensors["lora_B.weight"]}
