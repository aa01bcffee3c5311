"""QA-LoRA: LoRA that reads sums over groups of inputs.

    y = W x + b + s · B (A p),    p_g = Σ x_i over the i of group g,    s = alpha / r

Groups are group_size neighbouring inputs. A (r, d_in / group_size) starts as U(±1/√(d_in / group_size)), B (d_out, r)
as zeros, which makes step 0 the identity; both are trained. All weights of a group and a row are changed by the same
number: where the base is quantised with a zero point for each group, the zero points can take up the change, and the
merged model is as small as before. Needs nothing of the base; group_size divides d_in. r (d_in / group_size + d_out)
parameters and as many multiply-accumulates per token.

Xu, Xie, Gu, Chen, Chang, Zhang, Chen, Zhang, Tian: QA-LoRA, 2023 (ICLR 2024), arXiv:2309.14717. The peft package has
it for GPTQ layers, with p multiplied by (d_in / group_size) / group_size: its A is read and written with that factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lora_lite_core import (
    ConfigError,
    DropoutConfig,
    MergeError,
    ParamSpec,
    TargetError,
    dropped,
    hookimpl,
    lowrank_delta,
)

LAYERS = ("linear", "convolution", "experts")
BENCH = {"lr": 5e-3}


@dataclass(frozen=True, kw_only=True)
class QALoRAConfig(DropoutConfig):
    """Config of QA-LoRA.

    group_size  inputs in a group, that of the base's quantisation; divides the d_in of every target
    """

    variant = "qalora"

    group_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 1:
            raise ConfigError(f"QALoRAConfig(group_size={self.group_size!r}): it is a whole number of at least 1")


Config = QALoRAConfig


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: QALoRAConfig) -> dict[str, ParamSpec]:
    if d_in % cfg.group_size:
        fitting = [size for size in range(1, min(d_in, 256) + 1) if d_in % size == 0]
        raise TargetError(f"QALoRAConfig(group_size={cfg.group_size}) does not divide d_in={d_in}; these do: {fitting}")
    return {
        "lora_A": ParamSpec((cfg.r, d_in // cfg.group_size), "kaiming_uniform", doc="directions in the sums of groups"),
        "lora_B": ParamSpec((d_out, cfg.r), doc="what each direction adds to the output"),
    }


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: QALoRAConfig, training: bool) -> Tensor:
    sums = dropped(x, cfg, training).unflatten(-1, (-1, cfg.group_size)).sum(-1)
    return lowrank_delta(sums, params["lora_A"], params["lora_B"], cfg.scale).to(y.dtype).add_(y)


@hookimpl
def to_peft(params: dict[str, Tensor], cfg: QALoRAConfig, layer: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if isinstance(layer, nn.Linear):
        raise MergeError("PEFT has QA-LoRA for GPTQ layers alone: on an nn.Linear it would make a LoRA of the folder")
    A, fields = params["lora_A"], {"peft_type": "LORA", "use_qalora": True, "qalora_group_size": cfg.group_size}
    fields |= {"r": cfg.r, "lora_alpha": cfg.r if cfg.alpha is None else cfg.alpha, "lora_dropout": cfg.dropout}
    fields |= {"rank_pattern": {}, "alpha_pattern": {}}
    return fields, {"lora_A.weight": A * (cfg.group_size / A.shape[1]), "lora_B.weight": params["lora_B"]}


@hookimpl
def from_peft(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    if config["peft_type"] != "LORA" or not config.get("use_qalora"):
        return None
    grown = config["r"] ** 0.5 if config.get("use_rslora") else 1  # alpha / √r is √r alpha / r
    A, size = tensors["lora_A.weight"], QALoRAConfig(group_size=config["qalora_group_size"]).group_size
    fields = {"r": config["r"], "alpha": config["lora_alpha"] * grown, "group_size": size}
    fields["dropout"] = config.get("lora_dropout") or 0.0
    return fields, {"lora_A": A * (A.shape[1] / size), "lora_B": tensors["lora_B.weight"]}
