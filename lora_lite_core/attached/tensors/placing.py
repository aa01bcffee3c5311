"""Putting the tensors of one adapter on its layers, and what `reconfigure` and `drop` of a target do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...contract.errors import AdapterNameError, ModelStateError, TargetError
from ...contract.param_spec import ParamSpec
from ...contract.target import Target
from ..layer_hooks.putting import leaving_no_hook
from ..records import Record
from ..targets.experts import single
from .declared import attribute_name, specs_for
from .made import Made, as_made, check_in_place, make_tensors, not_finite, register_tensor, zeros_for


def remove_tensors(target: Target) -> None:
    for attribute in target.attributes.values():
        if hasattr(target.layer, attribute):
            delattr(target.layer, attribute)


class Making:
    """The tensors of one adapter while they are made; what a target's `reconfigure` and `drop` act on."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.model, self.seed = model, seed
        self.shared: Any = None  # made where a spec is shared
        self.placed: dict[Target, Made] = {}

    def place(self, target: Target, values: Mapping[str, Tensor] | None, *, ready: bool = True) -> None:
        """Make the tensors of one layer and put them on it; without values for now, for a model on meta."""
        declared = specs_for(target)
        specs = {bare: spec for bare, spec in declared.items() if not spec.shared}
        attributes = {bare: attribute_name(bare, target.adapter, target.part) for bare in specs}
        for attribute in attributes.values():
            if hasattr(target.layer, attribute):
                raise AdapterNameError(
                    f"{target.name} already has an attribute '{attribute}'; give this adapter another name: name='…'"
                )
        target.shared = {}
        common = {bare: spec for bare, spec in declared.items() if spec.shared}
        shared = self._place_shared(target, common, values or {}, ready) if common else {}
        own = None if values is None else {bare: value for bare, value in values.items() if bare in specs}
        made = make_tensors(target, specs, self.seed, own, shared) if ready else zeros_for(target, specs)
        for bare, attribute in attributes.items():
            register_tensor(target.layer, attribute, specs[bare], made[bare])
        target.attributes, target.placing = attributes, self
        target.saved = tuple(bare for bare, spec in specs.items() if spec.persistent)
        self.placed[target] = as_made(target.params)

    def _place_shared(
        self, target: Target, specs: Mapping[str, ParamSpec], values: Mapping[str, Tensor], ready: bool
    ) -> Mapping[str, Tensor]:
        from .shared import SharedTensors

        self.shared = self.shared or SharedTensors(self.model, self.seed)
        made: Mapping[str, Tensor] = self.shared.place(target, specs, values, ready=ready)
        return made

    def _release_shared(self) -> None:
        if self.shared is not None:
            self.shared.release(self.placed)

    def place_anew(self, target: Target, cfg: Any) -> None:
        remove_tensors(target)
        target.cfg = cfg
        self.place(target, None)
        self._release_shared()

    def drop(self, target: Target) -> None:
        remove_tensors(target)
        target.placing = None
        del self.placed[target]
        self._release_shared()

    def run_group_init(self, model: nn.Module, record: Record, calibration_data: Any) -> None:
        if record.variant.group_init is None:
            return
        label = f"group_init of variant '{record.variant.name}'"
        targets = tuple(one for target in self.placed for one in single(target))
        given = {"model": model, "targets": targets, "cfg": record.cfg}
        with torch.no_grad(), leaving_no_hook(model, label):
            try:
                record.variant.group_init({**given, "calibration_data": calibration_data})
            except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
                raise ModelStateError(f"{label} failed; does a weight hold nan or inf?\n  {error}") from error
        if not self.placed:
            raise TargetError(f"{label} dropped every target; nothing is left to train")
        for target, made in self.placed.items():
            check_in_place(f"{label}, on {target.name},", target.params, made)
            if wrong := sorted(not_finite(target.params)):
                raise ModelStateError(
                    f"{label} made {wrong[0]} of {target.name} with nan or inf; does a weight hold any?"
                )
