"""Parameters in shards (FSDP2): gathered, written in place, brought back to their places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..contract.errors import ModelStateError
from .kinds.layer_kinds import is_a, is_sharded


def is_in_shards(model: nn.Module) -> bool:
    """Whether FSDP2 has the model, or a part of it."""
    return any(is_a(module, "FSDPModule") for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Have every parameter be a shard: after a forward pass FSDP2 leaves those of the outermost module whole."""
    for module in model.modules():
        if is_a(module, "FSDPModule"):
            module.reshard()  # type: ignore[operator]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered from all processes where it is in shards."""
    if not is_sharded(tensor):
        return tensor.detach()
    gathered: Tensor = tensor.full_tensor()
    return gathered.detach()


def copy_shard(sharded: Any, full: Tensor) -> None:
    """Write this process's part of a whole tensor into a shard, in place."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = sharded.device_mesh
    full = full.to(sharded.device, sharded.dtype)
    there = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
    sharded.to_local().copy_(there.redistribute(mesh, sharded.placements).to_local())


def on_first_process(act: Callable[[], None]) -> None:
    """Run it on the first process alone, and have all of them fail where it fails."""
    said: list[str] = [""]
    error: BaseException | None = None
    if torch.distributed.get_rank() == 0:
        try:
            act()
        except Exception as problem:
            error, said = problem, [f"{type(problem).__name__}: {problem}"]
    torch.distributed.broadcast_object_list(said, src=0)
    if error is not None:
        raise error
    if said[0]:
        raise ModelStateError(f"the first process could not write the file: {said[0]}")
