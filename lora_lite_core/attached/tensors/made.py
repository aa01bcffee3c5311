"""Making the tensors of one adapter on one layer: filled by specs, by `init`, from a file; registered."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ...contract.errors import BrokenPlugin, ModelStateError
from ...contract.param_spec import ParamSpec
from ...contract.target import Target
from ...layers.kinds.layer_kinds import layer_device
from ..targets.experts import single
from .declared import generator_for, tensor_dtype

Made = dict[str, tuple[Tensor, torch.Size]]  # by bare name


def make_tensors(
    target: Target,
    specs: Mapping[str, ParamSpec],
    seed: int,
    values: Mapping[str, Tensor] | None,
    shared: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The layer's own tensors: those in `values` with the file's values, the others made by `init`; or all new. `init`
    sees the `shared` ones, too.

    A file's values stand before `init` runs, which may read them, and are written again over what it has touched.
    """
    made = zeros_for(target, specs)
    given = values or {}
    copy_values(given, made)
    for bare, tensor in made.items():
        if bare not in given:
            fill(tensor, specs[bare], generator_for(seed, target, bare), f"{target.name}.{bare}")
    if len(given) < len(made):
        _run_init(target, made, shared or {}, seed, given)
        copy_values(given, made)
    return made


def zeros_for(target: Target, specs: Mapping[str, ParamSpec]) -> dict[str, Tensor]:
    device = layer_device(target.layer)
    return {
        bare: torch.zeros(spec.shape, dtype=tensor_dtype(spec, target.cfg, target.layer), device=device)
        for bare, spec in specs.items()
    }


@torch.no_grad()
def copy_values(values: Mapping[str, Tensor], made: Mapping[str, Tensor]) -> None:
    for bare, value in values.items():
        made[bare].copy_(value)


@torch.no_grad()
def _run_init(
    target: Target, made: Mapping[str, Tensor], shared: Mapping[str, Tensor], seed: int, given: Collection[str]
) -> None:
    for one in single(target, {**made, **shared}) if target.variant.init is not None else ():
        _init_one(one, shared, seed, given)


def _init_one(target: Target, shared: Mapping[str, Tensor], seed: int, given: Collection[str]) -> None:
    assert target.variant.init is not None
    assert target.seen is not None
    params, before = {**target.seen}, as_made(target.seen)
    versions = {bare: tensor._version for bare, tensor in shared.items()}
    arguments = {"layer": target.layer, "params": params, "cfg": target.cfg, "name": target.name}
    arguments["generator"] = generator_for(seed, target, "init")
    label = f"init of variant '{target.variant.name}'"
    given_so = not_finite({bare: params[bare] for bare in given})
    try:
        returned = target.variant.init(arguments)
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise ModelStateError(
            f"{label} failed on {target.name}; does its weight hold nan or inf?\n  {error}"
        ) from error
    if returned is not None or params.keys() != before.keys():
        raise BrokenPlugin(
            f"{label} returned something or added names to params; "
            "it fills the tensors of param_specs in place and returns None"
        )
    check_in_place(label, params, before)
    if written := [bare for bare, version in versions.items() if shared[bare]._version != version]:
        raise BrokenPlugin(
            f"{label} wrote params['{written[0]}'], which other layers share; give it an init in ParamSpec, or fill it "
            "in group_init"
        )
    if wrong := sorted(not_finite({bare: params[bare] for bare in params.keys() - shared.keys()}) - given_so):
        raise ModelStateError(f"{label} made {wrong[0]} of {target.name} with nan or inf; does its weight hold any?")


def not_finite(tensors: Mapping[str, Tensor]) -> set[str]:
    """The names of those that hold nan or inf; on the meta device nothing is held."""
    return {bare for bare, tensor in tensors.items() if tensor.device.type != "meta" and not tensor.isfinite().all()}


def as_made(tensors: Mapping[str, Tensor]) -> Made:
    """The tensors and their shapes, to be compared by `check_in_place`."""
    return {bare: (tensor, tensor.shape) for bare, tensor in tensors.items()}


def check_in_place(label: str, now: Mapping[str, Tensor], made: Made) -> None:
    """BrokenPlugin unless the tensors are still the same objects, with the shapes that they had."""
    for bare, (tensor, shape) in made.items():
        if now.get(bare) is not tensor:
            raise BrokenPlugin(f"{label} replaced params['{bare}']; fill it in place, with copy_()")
        if tensor.shape != shape:
            raise BrokenPlugin(
                f"{label} gave {bare} the shape {tuple(tensor.shape)} by .data = …, where param_specs says "
                f"{tuple(shape)}; fill it in place, with copy_()"
            )


def fill(tensor: Tensor, spec: ParamSpec, generator: torch.Generator, name: str) -> None:
    """On the CPU in float32 first, so that every device and dtype gets the same numbers."""
    if spec.init == "zeros":
        return
    dtype = torch.float32 if tensor.dtype.is_floating_point else tensor.dtype
    with torch.no_grad():
        in_place = tensor.device.type == "cpu" and tensor.dtype == dtype
        drawn = tensor if in_place else torch.zeros(tensor.shape, dtype=dtype, device="cpu")
        try:
            spec.fill(drawn, generator)
        except Exception as error:
            raise BrokenPlugin(f"init of {name}, called as f(tensor, generator), failed: {error}") from error
        if not in_place:
            tensor.copy_(drawn)


def register_tensor(layer: nn.Module, attribute: str, spec: ParamSpec, tensor: Tensor) -> None:
    if spec.as_buffer:
        layer.register_buffer(attribute, tensor, persistent=spec.persistent)
    else:
        layer.register_parameter(attribute, nn.Parameter(tensor, requires_grad=bool(spec.trainable)))
