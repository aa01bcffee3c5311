"""attach, detach, adapters: named adapters on a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..contract.config import AdapterConfig
from ..contract.errors import CalibrationError, ModelStateError
from ..contract.target import Target
from ..layers.kinds.layer_kinds import layer_device
from ..layers.shards import is_in_shards
from .attach_detach import install, uninstall
from .model_checks import (
    Reaction,
    check_attachable,
    check_behaviour,
    check_calibration,
    check_has_weights,
    check_not_sharded,
    check_reaction,
    check_seed,
    check_takes_parameters,
    variant_of,
    warn_of_ties,
)
from .records import (
    Record,
    Whole,
    check_name,
    check_one_owner,
    check_outside,
    names_of,
    record_of,
    records_of,
    targets_of,
)
from .targets.targeting import find_targets

if TYPE_CHECKING:
    from os import PathLike


class Adapter:
    """A handle on one attached adapter. Holds nothing itself: everything is on the model."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model = model
        self.name = name

    @property
    def record(self) -> Record:
        """What the core remembers about it, on the model itself; read-only."""
        return record_of(self.model, self.name)

    @property
    def cfg(self) -> AdapterConfig:
        """The config it was attached with; a target's own may differ by its patterns."""
        return self.record.cfg

    @property
    def targets(self) -> tuple[str, ...]:
        """The dotted names of the layers it is on."""
        return self.record.layers

    def layers(self) -> Mapping[str, Target]:
        """What `group_init` sees of each layer, by name: its config, sizes and `params`; read-only. Raises
        ModelStateError when a layer was removed or replaced since."""
        return MappingProxyType(targets_of(self.model, self.name))

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor, frozen ones and buffers too, as `<layer>.<bare name>`, then once those that layers share, as
        `lora_A_64x256`, then those of whole modules."""
        layers = self.layers()
        for layer_name, target in layers.items():
            for bare, attribute in target.attributes.items():
                yield f"{layer_name}.{bare}", getattr(target.layer, attribute)
        shared = (one for target in layers.values() for one in target.shared.values())
        yield from {attribute.partition("__")[0]: held[attribute] for _, attribute, held in shared}.items()
        yield from self._whole().items()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters to train, for an optimizer."""
        return (t for _, t in self.named_tensors() if isinstance(t, nn.Parameter) and t.requires_grad)

    def initialize(self, calibration_data: Any = None) -> Adapter:
        """Make the values of an adapter that was attached on the meta device, now that the base has its weights.

        Its tensors are created anew (build the optimizer afterwards); in shards (FSDP2) they are filled, on all of the
        processes. Raises ModelStateError when it has values already or a layer is still on meta, CalibrationError.
        """
        record = self.record
        if record.ready:
            raise ModelStateError(f"adapter '{self.name}' has its values already; this is for one attached on meta")
        check_attachable(self.model, in_shards=is_in_shards(self.model))
        check_takes_parameters(self.model)
        check_calibration(record.variant, calibration_data)
        waiting = targets_of(self.model, self.name).values()
        check_has_weights(waiting)
        check_behaviour(waiting)
        targets = [replace(target, attributes={}, saved=(), shared={}) for target in waiting]
        install(self.model, self.name, replace(record, ready=True), targets, calibration_data=calibration_data)
        return self

    def refresh(self, *, on_base_mismatch: Reaction = "error") -> Sequence[str]:
        """Take again what the adapter has from its base, when the base's weights were changed under it: tensors that
        are not saved but computed from the weight (row norms), and fingerprints. Returns the layers that had changed.

        A variant whose frozen tensors were made of the old weights (singular vectors) does not fit a new base: raises
        BaseMismatch, or warns and goes on with on_base_mismatch="warn" ("ignore"). What is trained is not touched.
        """
        check_reaction(on_base_mismatch)
        if not self.record.ready:
            raise ModelStateError(f"adapter '{self.name}' has no values yet; call initialize() first")
        check_outside(self.model, "merged")
        from .model_hooks.base_check import refresh

        return refresh(self.model, self.name, on_base_mismatch)

    def save(self, path: str | PathLike[str]) -> None:
        """`save(model, path, name=…)` of this adapter."""
        from .. import save  # by its public name, as a user would: adapters on a model know nothing of files

        save(self.model, path, name=self.name)

    def load_(self, path: str | PathLike[str], *, on_base_mismatch: Reaction = "error") -> Adapter:
        """`load_into(model, path, name=…)` of this adapter: other values in the same tensors."""
        from .. import load_into  # by its public name, as `save`

        load_into(self.model, path, name=self.name, on_base_mismatch=on_base_mismatch)
        return self

    def detach(self) -> None:
        """`detach(model, name)` of this adapter."""
        detach(self.model, self.name)

    def _whole(self) -> Mapping[str, torch.Tensor]:
        """The tensors of modules that are trained whole, by full name."""
        if not self.record.whole:
            return {}
        from .targets.train_modules import current

        return current(self.model, self.record)

    def __repr__(self) -> str:
        if self.name not in records_of(self.model).adapters:
            return f"<Adapter '{self.name}': detached>"
        from .switching.shown import in_words

        return in_words(self.model, self.name)


def attach(
    model: nn.Module,
    cfg: AdapterConfig,
    *,
    name: str = "default",
    calibration_data: Any = None,
    seed: int = 0,
    check_inputs: Any = None,
) -> Adapter:
    """Put a new adapter on the layers that the config selects, and freeze the base.

    model             any nn.Module with layers to adapt; not compiled, sharded or wrapped
    cfg               a variant's config, as LoRAConfig(r=8, target_names=("q_proj", "v_proj"))
    name              an identifier without "__"; several adapters may sit on one model
    calibration_data  batches for variants that look at activations, a list or DataLoader (read more than once)
    seed              of every random tensor, together with the names of the layer and of the adapter
    check_inputs      a batch (dict, tuple or tensor): raise TargetError when a run on it does not call every target

    The base weights are not written; the adapted model computes exactly what the frozen base does. The first adapter
    freezes all parameters of `model` (what is outside of it keeps its flags); what is turned on again later stays on.
    On a model on the meta device the values wait for `Adapter.initialize()`. Either all of it happens or none.

    Raises TargetError, UnsupportedLayer, AdapterNameError, ConfigError, CalibrationError, ModelStateError, BrokenPlugin
    """
    variant = variant_of(cfg)
    check_attachable(model)
    check_takes_parameters(model)
    check_one_owner(model)
    check_name(model, name)
    check_seed(seed)
    targets = find_targets(model, cfg, variant, name)
    whole: dict[str, Whole] = {}
    if cfg.train_modules:
        from .targets.train_modules import whole_copies

        whole = whole_copies(model, cfg)
    check_calibration(variant, calibration_data)
    check_behaviour(targets)
    if check_inputs is not None:
        from ..layers.dry_run import check_reached

        check_reached(model, {target.name: target.layer for target in targets}, check_inputs)
    on_meta = any(layer_device(target.layer).type == "meta" for target in targets)
    if on_meta and calibration_data is not None:
        later = "give the data to adapter.initialize(calibration_data=…) once its weights are there"
        raise CalibrationError(f"the model is on the meta device and cannot be calibrated yet; {later}")
    warn_of_ties(model, targets)
    record = Record(variant, cfg, seed, ready=not on_meta, whole=whole)
    install(model, name, record, targets, calibration_data=calibration_data)
    return Adapter(model, name)


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter off, or all of them (None). The last one turns the parameters that `attach` froze on again.

    Either all of it happens or none. Raises AdapterNameError when there is none.
    """
    names = names_of(model, name)
    check_outside(model)
    check_not_sharded(model, "switch adapters off with disabled(model); a sharded model cannot lose its tensors")
    uninstall(model, names)


class Adapters(dict[str, Adapter]):
    """The adapters on a model by name, in attach order. Printed, it is a table: what is active (its place in the order)
    and how strong."""

    def __str__(self) -> str:
        if not self:
            return "no adapters"
        from .switching.shown import as_table

        return as_table(next(iter(self.values())).model)


def adapters(model: nn.Module) -> Adapters:
    """The adapters on the model by name, in attach order; printed, a table of what is active and how strong."""
    return Adapters({name: Adapter(model, name) for name in records_of(model).adapters})
