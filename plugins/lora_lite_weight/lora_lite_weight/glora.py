"""GLoRA: the weight and the bias are scaled and shifted, each by a part of a chosen form.

    W' = W + W ⊙ A + B,   b' = b + b ⊙ D + E + W C

`weight` is the form of A and B (d_out, d_in), `prompt` that of C (d_in), `bias` that of D and E (d_out):

    "lora"      X_d X_u: X_d zeros, X_u (r, d_in), of C (r, 1), from U(±1/√ its last size)
    "vector"    one number for each output (of C for each input), from zero
    "constant"  one number, from zero; not for C
    "none"      left out

Every part starts as zero, which makes step 0 the identity. As in PEFT, C, D and E are only on layers that have a bias.
"lora" takes the dense weight in every call, C its product with one vector; A as a vector or constant is put on the
layer's output so far without its bias. A file may go on another base. With the defaults 2 r (d_in + d_out) + r d_in +
r + 2 parameters, d_in d_out multiply-accumulates per token and 2 r d_in d_out per call.

Chavan, Liu, Gupta, Xing, Shen: One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning, 2023,
arXiv:2306.07967. The authors choose the forms by a search over layers; here they are settings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lite_core import ConfigError, ParamSpec, RankConfig, dense_weight, hookimpl, layer_dtype, project

from . import _peft_glora

BENCH = {"lr": 1e-2}
FORMS = {
    "weight": ("lora", "vector", "constant", "none"),
    "prompt": ("lora", "vector", "none"),
    "bias": ("vector", "constant", "none"),
}


@dataclass(frozen=True, kw_only=True)
class GLoRAConfig(RankConfig):
    """Config of GLoRA.

    weight  form of A and B: "lora", "vector", "constant" or "none"
    prompt  form of C: "lora", "vector" or "none"
    bias    form of D and E: "vector", "constant" or "none"
    """

    variant = "glora"

    weight: str = "lora"
    prompt: str = "lora"
    bias: str = "constant"

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, allowed in FORMS.items():
            if getattr(self, field) not in allowed:
                raise ConfigError(f"GLoRAConfig({field}={getattr(self, field)!r}): give one of {', '.join(allowed)}")
        if {self.weight, self.prompt, self.bias} == {"none"}:
            raise ConfigError("GLoRAConfig: weight, prompt and bias are all 'none', so that there is nothing to train")


Config = GLoRAConfig
to_peft, from_peft = hookimpl(_peft_glora.to_peft), hookimpl(_peft_glora.from_peft)


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: GLoRAConfig, layer: nn.Module) -> dict[str, ParamSpec]:
    return _peft_glora.specs(d_in, d_out, cfg, getattr(layer, "bias", None) is not None)


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: GLoRAConfig, layer: nn.Module) -> Tensor:
    dtype = x.dtype if x.is_floating_point() else layer_dtype(layer)
    p = {name.removeprefix("lora_"): tensor.to(dtype) for name, tensor in params.items()}
    bias = getattr(layer, "bias", None)
    if cfg.weight == "lora":
        W = dense_weight(layer).to(dtype)
        y = y + project(x, torch.addcmul(p["Bd"] @ p["Bu"], W, p["Ad"] @ p["Au"])).to(y.dtype)
    elif cfg.weight != "none":
        total = x.sum(-1, keepdim=True) if x.is_floating_point() else y.new_ones(())  # token ids: rows of one 1
        own = y if bias is None else y - bias
        y = y + (own * p["A"] + total * p["B"]).to(y.dtype)
    if "Cd" in p or "C" in p:
        C = p["C"] if "C" in p else (p["Cd"] @ p["Cu"])[:, 0]
        y = y + (dense_weight(layer).to(dtype) @ C).to(y.dtype)
    return y if "D" not in p or bias is None else y + (bias * p["D"] + p["E"]).to(y.dtype)
