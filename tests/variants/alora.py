"""aLoRA: LoRA that is on from the invocation tokens of each sequence onward, and off before them.

    y_t = W x_t + b + s · [t ≥ start] B A x_t,   s = alpha / r

`start` is where the last occurrence of the invocation tokens begins in `input_ids`; without any the adapter is off. What
comes before is the base model's, whose key-value cache can be used. B starts as zeros (the identity).

Greenewald, Lastras, Parnell et al.: Activated LoRA, 2025, arXiv:2504.12397.
"""

from dataclasses import dataclass

import torch

from lora_lite_core import LowRankConfig, ParamSpec, hookimpl, lowrank_delta


@dataclass(frozen=True, kw_only=True)
class ALoRAConfig(LowRankConfig):
    variant = "alora"
    invocation: tuple[int, ...] = (1,)


Config = ALoRAConfig


@hookimpl
def param_specs(d_in, d_out, cfg):
    return {"lora_A": ParamSpec((cfg.r, d_in), "kaiming_uniform"), "lora_B": ParamSpec((d_out, cfg.r))}


@hookimpl
def forward(x, y, params, cfg, context):
    delta = lowrank_delta(x, params["lora_A"], params["lora_B"], cfg.scale).to(y.dtype)
    ids = context.get("input_ids")
    return y + (delta if ids is None else delta * _on(ids, cfg.invocation).to(y.dtype)[..., None])


def _on(ids, tokens):
    """(batch, length): 1 from the last occurrence of the tokens on, 0 before it."""
    length, width = ids.shape[1], len(tokens)
    padded = torch.nn.functional.pad(ids, (0, width - 1), value=-1)
    found = torch.stack([padded[:, i : i + length] == token for i, token in enumerate(tokens)]).all(0)
    places = torch.arange(length, device=ids.device)
    start = torch.where(found, places, -1).amax(1, keepdim=True)
    return (places >= start) & (start >= 0)
