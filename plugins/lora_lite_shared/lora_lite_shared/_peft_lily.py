"""Which layers share what in Lily, here and in PEFT, and the same as `_peft`."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from lora_lite_core import MergeError

from ._peft import Pair, Sizes, linear_only


def group_of(name: str, stride: int) -> tuple[str, int]:
    """Of a dotted name the kind, which is the name without its block's number, and the number of its group."""
    *path, last = name.split(".")
    numbers = [int(part) for part in path if part.isdecimal()]
    kind = "_".join([*(part for part in path if not part.isdecimal()), last])
    return re.sub(r"\W|_+", "_", kind).strip("_"), numbers[0] // stride if numbers else 0


def lily_to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module, name: str, sizes: Sizes) -> Pair:
    """PEFT counts layers of one ending and size, in the model's order, and shares by that number."""
    linear_only(layer, "Lily")
    if not cfg.average:
        raise MergeError("PEFT's Lily mixes by the mean over all tokens (average=True)")
    mates = [one for one in sizes if sizes[one] == sizes[name] and one.rpartition(".")[2] == name.rpartition(".")[2]]
    leader = mates[mates.index(name) // cfg.stride * cfg.stride]
    for other, stride, what in ((mates[0], 10**9, "B"), (leader, cfg.stride, "A")):
        if group_of(other, stride) != group_of(name, stride):
            raise MergeError(f"PEFT would share {what} between {other} and {name}, which have one each here")
    fields = {"peft_type": "LILY", "r": cfg.r, "stride_A": cfg.stride, "num_B": cfg.experts, "scaling": cfg.scaling}
    B = params["lora_B"].T.contiguous()
    return fields, {"lily_A.weight": params["lora_A"], "lily_B.weight": B, "lily_router.weight": params["lora_R"]}


def lily_from_peft(config: dict[str, Any], tensors: dict[str, Tensor]) -> Pair:
    fields = {"r": config["r"], "stride": config["stride_A"], "experts": config["num_B"], "scaling": config["scaling"]}
    B = tensors["lily_B.weight"].T
    return fields, {"lora_A": tensors["lily_A.weight"], "lora_B": B, "lora_R": tensors["lily_router.weight"]}
