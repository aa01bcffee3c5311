"""A target as the linear layers that it is: fused experts are several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ...contract.errors import TargetError
from ...contract.target import Params, Target
from ...layers.kinds.experts import all_experts, expert
from ...layers.kinds.layer_kinds import storage_of


def single(target: Target, params: Mapping[str, Tensor] | None = None) -> list[Target]:
    """The target itself, or each of its experts as a target of its own: an nn.Linear that shares the memory of the
    module's parameter, and slices of the adapter's tensors.

    params  the adapter's tensors, where they are not on the layer
    """
    if not target.experts:
        return [target if params is None else replace(target, seen=Params(params))]
    whole = target.params if params is None else params
    return [
        replace(
            target,
            name=f"{target.name}.{index}",
            layer=expert(target.layer, target.part, index),
            part="",
            experts=0,
            stack=target,
            number=index,
            kind="linear",
            seen=Params(target.of_expert(whole, index)),
            placing=None if target.placing is None else _Together(),
        )
        for index in range(target.experts)
    ]


def as_layer(target: Target) -> nn.Module:
    """The target's layer; of fused experts a linear layer with the outputs of all of them."""
    return all_experts(target.layer, target.part) if target.experts else target.layer


def first_layer(target: Target) -> nn.Module:
    """The target's layer, or the first of its experts, which are all alike."""
    return expert(target.layer, target.part, 0) if target.experts else target.layer


def storage_now(target: Target) -> str:
    """How the target's layer keeps its weight by now."""
    return storage_of(target.layer) if target.kind not in ("experts", "block") else "dense"


class _Together:
    """Experts of one parameter keep their tensors in one stack: none of them changes its shapes alone."""

    def place_anew(self, target: Target, cfg: Any) -> None:
        raise TargetError(
            f"{target.name} is one of several fused experts, which keep one config and one shape of tensors; leave "
            "them out with exclude_names, or give every layer one rank"
        )

    def drop(self, target: Target) -> None:
        raise TargetError(f"{target.name} is one of several fused experts, which have an adapter all or none")
