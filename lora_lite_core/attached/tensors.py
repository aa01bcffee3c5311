"""The tensors of one adapter on one layer: declared, named, made, filled, registered."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..contract.config import AdapterConfig
from ..contract.errors import AdapterNameError, BrokenPlugin, LoraLiteError, TargetError
from ..contract.param_spec import ParamSpec
from ..contract.target import Shared, Target
from ..layers.layer_kinds import layer_device, layer_dtype

Made = dict[str, tuple[Tensor, torch.Size]]  # by bare name


def specs_for(target: Target) -> dict[str, ParamSpec]:
    """The checked parameter specs of one layer. What the variant raises is raised with the layer's name before it."""
    sizes = {"d_in": target.d_in, "d_out": target.d_out}
    given = {**sizes, "cfg": target.cfg, "layer": target.layer, "name": target.name}
    try:
        specs = target.variant.param_specs(given)
    except LoraLiteError as error:  # a variant refuses a layer; it does not know its name
        raise type(error)(f"{target.name}: {error}") from error
    label = f"param_specs of variant '{target.variant.name}' for {target.name}"
    if not isinstance(specs, Mapping) or not all(isinstance(spec, ParamSpec) for spec in specs.values()):
        raise BrokenPlugin(f"{label} returned {specs!r}; return a dict of name: ParamSpec(…)")
    if not specs:
        raise BrokenPlugin(f"{label} returned no tensor; an adapter has at least one")
    for bare in specs:
        if not bare.startswith("lora_") or not bare.isidentifier() or "__" in bare:
            raise BrokenPlugin(
                f"{label} names a tensor '{bare}'; names start with lora_, are identifiers and have no __"
            )
    return dict(specs)


def attribute_name(bare: str, adapter: str) -> str:
    """`lora_A` on the layer for "default", `lora_A__style` for "style"."""
    return bare if adapter == "default" else f"{bare}__{adapter}"


def tensor_dtype(spec: ParamSpec, cfg: AdapterConfig, layer: nn.Module) -> torch.dtype:
    if spec.dtype is not None:
        return spec.dtype
    if cfg.dtype is not None:
        return getattr(torch, str(cfg.dtype))
    return torch.float64 if layer_dtype(layer) == torch.float64 else torch.float32


def generator_for(seed: int, target: Target, tensor: str) -> torch.Generator:
    """A CPU generator that depends on the seed and these names alone: not on order, device, process or other targets.

    The adapter's name is one of them, so that two adapters start differently; "default" is left out, as it always was.
    """
    words = [str(seed), target.name, tensor, *([] if target.adapter == "default" else [target.adapter])]
    digest = hashlib.sha256("\n".join(words).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


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
    _copy(given, made)
    for bare, tensor in made.items():
        if bare not in given:
            fill(tensor, specs[bare], generator_for(seed, target, bare), f"{target.name}.{bare}")
    if len(given) < len(made):
        _run_init(target, made, shared or {}, seed)
        _copy(given, made)
    return made


def zeros_for(target: Target, specs: Mapping[str, ParamSpec]) -> dict[str, Tensor]:
    device = layer_device(target.layer)
    return {
        bare: torch.zeros(spec.shape, dtype=tensor_dtype(spec, target.cfg, target.layer), device=device)
        for bare, spec in specs.items()
    }


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], made: Mapping[str, Tensor]) -> None:
    for bare, value in values.items():
        made[bare].copy_(value)


@torch.no_grad()
def _run_init(target: Target, made: Mapping[str, Tensor], shared: Mapping[str, Tensor], seed: int) -> None:
    if target.variant.init is None:
        return
    params, before = {**made, **shared}, as_made({**made, **shared})
    versions = {bare: tensor._version for bare, tensor in shared.items()}
    generator = generator_for(seed, target, "init")
    given = {"layer": target.layer, "params": params, "cfg": target.cfg, "name": target.name, "generator": generator}
    label = f"init of variant '{target.variant.name}'"
    if target.variant.init(given) is not None or params.keys() != before.keys():
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


class SharedTensors:
    """The tensors of one adapter that several layers share, on the module that `attach` was given."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.model, self.seed = model, seed
        self.specs: dict[str, ParamSpec] = {}  # by attribute of the model

    def place(
        self, target: Target, specs: Mapping[str, ParamSpec], values: Mapping[str, Tensor], *, ready: bool
    ) -> dict[str, Tensor]:
        """Those of one layer, made and put on the model where no layer before has had them."""
        target.shared = {
            bare: self._find_or_make(target, spec, values.get(bare), ready) for bare, spec in specs.items()
        }
        return {bare: held[attribute] for bare, (_, attribute, held) in target.shared.items()}

    def _find_or_make(self, target: Target, spec: ParamSpec, value: Tensor | None, ready: bool) -> Shared:
        key = shared_key(spec)
        held: dict[str, Any] = self.model._buffers if spec.as_buffer else self.model._parameters
        attribute = attribute_name(key, target.adapter)
        dtype, device = tensor_dtype(spec, target.cfg, target.layer), layer_device(target.layer)
        if attribute in self.specs and held[attribute].device != device:
            if spec.trainable:
                raise TargetError(
                    f"{target.name} is on {device}, and {key}, which is trained and which it shares with other layers, "
                    f"on {held[attribute].device}; adapt layers of one device"
                )
            attribute = attribute_name(f"{key}_{str(device).replace(':', '')}", target.adapter)
        if attribute not in self.specs:
            if hasattr(self.model, attribute):
                raise AdapterNameError(f"the model already has an attribute '{attribute}'; give another name: name='…'")
            tensor = torch.zeros(spec.shape, dtype=dtype, device=device)
            if value is not None:
                _copy({key: value}, {key: tensor})
            elif ready:
                fill(tensor, spec, generator_for(self.seed, replace(target, name=key), "shared"), key)
            register_tensor(self.model, attribute, spec, tensor)
            self.specs[attribute] = spec
        there = self.specs[attribute]
        kinds = [(s.trainable, s.as_buffer, s.persistent) for s in (there, spec)]
        if kinds[0] != kinds[1] or held[attribute].dtype != dtype:
            raise BrokenPlugin(
                f"{target.name} shares {key} with other layers and declares another kind of it (trainable, as_buffer, "
                f"persistent, or dtype: {dtype} here, {held[attribute].dtype} there); give it one kind, or another key"
            )
        return Shared(key if spec.persistent else "", attribute, held)

    def release(self, targets: Iterable[Target]) -> None:
        """Take off the model what none of these uses."""
        used = {shared.attribute for target in targets for shared in target.shared.values()}
        for attribute in [one for one in self.specs if one not in used]:
            delattr(self.model, attribute)
            del self.specs[attribute]


def shared_key(spec: ParamSpec) -> str:
    """The name of a shared tensor in files, and on the model where the adapter is the default one: `lora_A_64x256`."""
    return f"lora_{spec.shared}_{'x'.join(map(str, spec.shape))}"


@torch.no_grad()
def take_fingerprint(target: Target) -> list[float] | None:
    """What the adapter assumes about this layer, as plain floats for a file's header."""
    if target.variant.fingerprint is None:
        return None
    value = target.variant.fingerprint({"layer": target.layer, "cfg": target.cfg})
    if value is not None and not isinstance(value, Tensor):
        raise BrokenPlugin(
            f"fingerprint of variant '{target.variant.name}' returned {type(value).__name__}; return a tensor or None"
        )
    return None if value is None else [float(f"{v:.7g}") for v in value.detach().float().flatten().tolist()]


def weight_version(layer: nn.Module) -> int:
    """How often torch has seen the layer's weight written in place."""
    weight = layer._parameters.get("weight")
    return -1 if weight is None else weight._version
