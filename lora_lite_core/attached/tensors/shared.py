"""The tensors of an adapter that several layers share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...contract.errors import AdapterNameError, BrokenPlugin, TargetError
from ...contract.param_spec import ParamSpec
from ...contract.target import Shared, Target
from ...layers.kinds.layer_kinds import layer_device
from .declared import attribute_name, generator_for, shared_key, tensor_dtype
from .made import copy_values, fill, register_tensor


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
                copy_values({key: value}, {key: tensor})
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
