"""LoRA with dropout on what goes into its factors, as in the paper's own code and in PEFT.

    y = W x + b + s · B A dropout(x),   s = alpha / r;   in evaluation y = W x + b + s · B A x

A (r, d_in) starts as U(±1/√d_in), B (d_out, r) as zeros: step 0 is the identity, in training, too. Needs nothing of the
base. r (d_in + d_out) parameters and multiply-accumulates per token.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen: LoRA, 2021 (ICLR 2022), arXiv:2106.09685.
"""

from dataclasses import dataclass

from lora_lite_core import DropoutConfig, ParamSpec, dropped, hookimpl, lowrank_delta

BENCH = {"lr": 1e-2}


@dataclass(frozen=True, kw_only=True)
class LoRADropoutConfig(DropoutConfig):
    variant = "lora_dropout"
    dropout: float = 0.05


Config = LoRADropoutConfig


@hookimpl
def param_specs(d_in, d_out, cfg):
    return {"lora_A": ParamSpec((cfg.r, d_in), "kaiming_uniform"), "lora_B": ParamSpec((d_out, cfg.r))}


@hookimpl
def forward(x, y, params, cfg, training):
    x = dropped(x, cfg, training)
    return y + lowrank_delta(x, params["lora_A"], params["lora_B"], cfg.scale).to(y.dtype)
