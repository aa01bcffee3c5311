"""PEQA: the scales of the weight's quantisation groups are trained, and nothing else.

    W' = W ⊙ (1 + δ),   one δ for each row of W and group of group_size inputs,   y = W x + b + (W ⊙ δ) x

A quantised weight is s ⊙ (codes − zero point) with one scale s a group: s (1 + δ) is another scale of the same codes.
Without a group_size a group is a whole row, and the change is δ ⊙ (W x), made of the layer's output so far. δ (d_out,
d_in / group_size) starts as zeros, which makes step 0 the identity. Any base will do, dense or quantised; the groups
are those of the quantisation where group_size says so. Groups smaller than a row take the dense weight in every call. A
file may go on another base. d_out d_in / group_size parameters; d_out multiply-accumulates per token for whole rows,
else d_in d_out per token and as many per call.

Kim, Lee, Kim, Park, Yoo, Kwon, Lee: Memory-Efficient Fine-Tuning of Compressed Large Language Models via sub-4-bit
Integer Quantization, 2023 (NeurIPS), arXiv:2305.14152. The authors also quantise; here the base is what it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lora_lite_core import AdapterConfig, ConfigError, ParamSpec, TargetError, dense_weight, hookimpl, project

BENCH = {"lr": 5e-2}


@dataclass(frozen=True, kw_only=True)
class PEQAConfig(AdapterConfig):
    """Config of PEQA.

    group_size  how many inputs share a scale, a divisor of d_in; None is all of them
    """

    variant = "peqa"

    group_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.group_size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ConfigError(f"PEQAConfig(group_size={size!r}): a group has at least 1 input; None is a whole row")


Config = PEQAConfig


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: PEQAConfig) -> dict[str, ParamSpec]:
    size = cfg.group_size or d_in
    if d_in % size:
        fitting = [number for number in range(1, min(d_in, 256) + 1) if d_in % number == 0]
        raise TargetError(f"PEQAConfig(group_size={size}) does not divide d_in={d_in}; sizes that do: {fitting}")
    shape = (d_out,) if size == d_in else (d_out, d_in // size)
    return {"lora_scale": ParamSpec(shape, doc="relative offset δ of each group's scale")}


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], layer: nn.Module) -> Tensor:
    delta = params["lora_scale"]
    if delta.dim() == 1:
        bias = getattr(layer, "bias", None)
        own = y if bias is None else y - bias
        return y + (own * delta.to(own.dtype)).to(y.dtype)
    weight = dense_weight(layer)
    scaled = weight.unflatten(1, (delta.shape[1], -1)) * delta.to(weight.dtype)[..., None]
    return y + project(x, scaled.flatten(1)).to(y.dtype)
