"""attach, detach, disabled, adapters: named adapters on a model."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..contract.config import AdapterConfig, RankConfig
from ..contract.errors import CalibrationError, ModelStateError
from ..contract.text import count
from ..layers.four_bit_packing import let_pack
from ..layers.kinds import layer_device
from .coverage import check_reached
from .forward_hooks import state_of
from .model_checks import (
    check_attachable,
    check_behaviour,
    check_calibration,
    check_has_weights,
    check_not_sharded,
    check_seed,
    variant_of,
)
from .placing import found_again, install, making_room
from .records import (
    RECORDS,
    Record,
    check_name,
    check_one_owner,
    check_outside,
    forget,
    inside,
    names_of,
    record_of,
    records_of,
)
from .targeting import find_targets
from .whole_modules import current, swap

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
        return tuple(self.record.targets)

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every adapter tensor, frozen ones and buffers too, as `<layer>.<bare name>`, then those of whole modules."""
        for layer_name, target in self.record.targets.items():
            layer = self.model.get_submodule(layer_name)
            for bare, attribute in target.attributes.items():
                yield f"{layer_name}.{bare}", getattr(layer, attribute)
        yield from current(self.model, self.record.originals).items()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters to train, for an optimizer."""
        return (t for _, t in self.named_tensors() if isinstance(t, nn.Parameter) and t.requires_grad)

    def initialize(self, calibration_data: Any = None) -> Adapter:
        """Make the values of an adapter that was attached on the meta device, now that the base has its weights.

        The adapter's tensors are created anew (build the optimizer afterwards). Raises ModelStateError when it has
        values already or a layer is still on meta, CalibrationError as `attach` does.
        """
        record = self.record
        if record.ready:
            raise ModelStateError(
                f"adapter '{self.name}' has its values already; initialize() is for one attached on meta"
            )
        check_attachable(self.model)
        check_calibration(record.variant, calibration_data)
        found = found_again(self.model, record)
        check_has_weights(found)
        check_behaviour(found)
        with making_room(self.model, self.name, record.variant):
            install(
                self.model, record.variant, record.cfg, self.name, record.seed, found, calibration_data=calibration_data
            )
        return self

    def save(self, path: str | PathLike[str]) -> None:
        """`save(model, path, name=…)` of this adapter."""
        from ..files.save import save

        save(self.model, path, name=self.name)

    def detach(self) -> None:
        """`detach(model, name)` of this adapter."""
        detach(self.model, self.name)

    def __repr__(self) -> str:
        if self.name not in records_of(self.model).adapters:
            return f"<Adapter '{self.name}': detached>"
        record = self.record
        trained = sum(p.numel() for p in self.parameters())
        total = sum(p.numel() for p in self.model.parameters())
        ranks = sorted({target.cfg.r for target in record.targets.values() if isinstance(target.cfg, RankConfig)})
        rank = f", r={'–'.join(str(r) for r in dict.fromkeys((ranks[0], ranks[-1])))}" if ranks else ""
        return (
            f"<Adapter '{self.name}': {record.variant.name}{rank}, {count(len(record.targets), 'layer')}, "
            f"{count(trained, 'trainable parameter')} ({trained / max(total, 1):.2%})>"
        )


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

    model             any nn.Module with linear layers; not compiled, sharded or wrapped
    cfg               a variant's config, as LoRAConfig(r=8, target_names=("q_proj", "v_proj"))
    name              an identifier without "__"; several adapters may sit on one model
    calibration_data  batches for variants that look at activations, a list or DataLoader (read more than once)
    seed              of every random tensor, together with the layer's name
    check_inputs      a batch (dict, tuple or tensor): raise TargetError when a run on it does not call every target

    The base weights are not written; the adapted model computes exactly what the base does. On a model on the meta
    device the values wait for `Adapter.initialize()`. Either all of it happens or none. Raises TargetError,
    UnsupportedLayer, AdapterNameError, ConfigError, CalibrationError, ModelStateError, BrokenPlugin.
    """
    variant = variant_of(cfg)
    check_attachable(model)
    check_one_owner(model)
    check_name(model, name)
    check_seed(seed)
    found = find_targets(model, cfg)
    check_calibration(variant, calibration_data)
    check_behaviour(found)
    if check_inputs is not None:
        check_reached(model, {target.name: target.layer for target in found}, check_inputs)
    on_meta = any(layer_device(target.layer).type == "meta" for target in found)
    if on_meta and calibration_data is not None:
        raise CalibrationError(
            "the model is on the meta device and cannot be calibrated yet; "
            "give the data to adapter.initialize(calibration_data=…) once its weights are there"
        )
    install(model, variant, cfg, name, seed, found, calibration_data=calibration_data, deferred=on_meta)
    return Adapter(model, name)


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter off, or all of them (None). The last one turns the parameters that `attach` froze on again.

    Raises AdapterNameError when there is none.
    """
    names = names_of(model, name)
    check_outside(model)
    check_not_sharded(model, "switch adapters off with disabled(model); a sharded model cannot lose its tensors")
    for one in names:
        forget(model, one)
    records = records_of(model)
    if records.adapters:
        return
    parameters = dict(model.named_parameters())
    for parameter_name in records.frozen:
        if parameter_name in parameters:
            parameters[parameter_name].requires_grad_(True)
    let_pack(model, records.unpacked)
    model.__dict__.pop(RECORDS, None)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters on the model by name, in attach order."""
    return {name: Adapter(model, name) for name in records_of(model).adapters}


@contextmanager
def disabled(model: nn.Module, name: str | None = None) -> Generator[None]:
    """Inside, the model computes without one adapter, or without all of them (None).

    Raises AdapterNameError when there is none.
    """
    names = names_of(model, name)
    check_outside(model, "merged")
    layers = [model.get_submodule(layer) for one in names for layer in record_of(model, one).targets]
    states = [state for state in (state_of(layer) for layer in layers) if state is not None]
    changed = {id(e): e for state in states for e in state.entries if e.name in names and e.enabled}.values()
    for entry in changed:
        entry.enabled = False
    trained = [swap(model, record_of(model, one).originals) for one in names]
    try:
        with inside(model, "disabled"):
            yield
    finally:
        for entry in changed:
            entry.enabled = True
        for tensors in trained:
            swap(model, tensors)
