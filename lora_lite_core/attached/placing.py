"""Putting one adapter's tensors and hooks on a model's layers, all of them or none."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..contract.config import AdapterConfig
from ..contract.errors import AdapterNameError, BrokenPlugin, ModelStateError, TargetError
from ..contract.variant import Variant
from ..layers.four_bit_packing import keep_unpacked, let_pack
from ..layers.kinds import layer_device, storage_of
from .forward_hooks import Entry, add_entry, remove_entry
from .records import Record, TargetRecord, forget, records_of, remember
from .targeting import Found
from .tensors import attribute_name, fill, generator_for, register_tensor, specs_for, take_fingerprint, tensor_dtype
from .whole_modules import check_untrained, put_copies, trained_tensors


class Target:
    """One layer as `group_init` sees it: name, layer, d_in, d_out, its own cfg, and params by bare name."""

    def __init__(self, owner: Installation, found: Found) -> None:
        self._owner: Installation | None = owner
        self.name, self.layer, self.d_in, self.d_out = found.name, found.layer, found.d_in, found.d_out
        self.cfg: Any = found.cfg  # of the variant's own class
        self.params: dict[str, Tensor] = {}
        self.attributes: dict[str, str] = {}
        self.saved: tuple[str, ...] = ()

    def reconfigure(self, **changes: Any) -> None:
        """Replace fields of this target's config (`reconfigure(r=5, alpha=10.0)`), make its tensors anew by
        `param_specs` and `init`, and refresh `params`. Raises ConfigError as the config does."""
        owner = self._open()
        cfg = replace(self.cfg, **changes)
        owner.remove(self)
        self.cfg = cfg
        owner.place(self)

    def drop(self) -> None:
        """Take the adapter off this layer."""
        owner = self._open()
        owner.remove(self)
        owner.targets.remove(self)
        self._owner = None

    def close(self) -> None:
        """Called by the core when `group_init` has returned; nothing can be changed from then on."""
        self._owner = None

    def _open(self) -> Installation:
        if self._owner is None:
            raise ModelStateError(f"target {self.name} can only be changed inside group_init, once until it is dropped")
        return self._owner

    def __repr__(self) -> str:
        return f"Target({self.name!r}, {self.d_in} → {self.d_out}, {self.cfg})"


class Installation:
    """One adapter on its way onto a model. `commit` makes it real; `rollback` leaves no trace."""

    def __init__(self, model: nn.Module, variant: Variant, cfg: AdapterConfig, name: str, seed: int) -> None:
        self.model, self.variant, self.cfg, self.name, self.seed = model, variant, cfg, name, seed
        self.targets: list[Target] = []
        self._hooked: list[Target] = []

    def add(self, found: Found, values: Mapping[str, Tensor] | None = None, *, deferred: bool = False) -> None:
        """Place the tensors of one layer: from `values` (a file's, by bare name), or made new by init, or (deferred,
        for a model on meta) without values for now."""
        target = Target(self, found)
        self.targets.append(target)
        self.place(target, values, deferred=deferred)

    def place(self, target: Target, values: Mapping[str, Tensor] | None = None, *, deferred: bool = False) -> None:
        specs = specs_for(self.variant, target.name, target.layer, target.d_in, target.d_out, target.cfg)
        device = layer_device(target.layer)
        attributes = {bare: attribute_name(bare, self.name) for bare in specs}
        for bare, attribute in attributes.items():
            if hasattr(target.layer, attribute):
                raise AdapterNameError(
                    f"{target.name} already has an attribute '{attribute}'; give this adapter another name: name='…'"
                )
            dtype = tensor_dtype(specs[bare], target.cfg, target.layer)
            tensor = torch.zeros(specs[bare].shape, dtype=dtype, device=device)
            if values is None and not deferred:
                fill(tensor, specs[bare], generator_for(self.seed, target.name, bare), f"{target.name}.{bare}")
            register_tensor(target.layer, attribute, specs[bare], tensor)
            target.attributes[bare] = attribute
        target.saved = tuple(bare for bare, spec in specs.items() if spec.persistent)
        target.params = {bare: getattr(target.layer, attribute) for bare, attribute in attributes.items()}
        if not deferred and (values is None or len(target.saved) < len(specs)):
            self._init(target)  # with a file's values only for what is not saved; the rest is written over here:
        with torch.no_grad():
            for bare, value in (values or {}).items():
                target.params[bare].copy_(value)

    def _init(self, target: Target) -> None:
        if self.variant.init is None:
            return
        given = dict(target.params)
        generator = generator_for(self.seed, target.name, "init")
        with torch.no_grad():
            returned = self.variant.init(
                {"layer": target.layer, "params": given, "cfg": target.cfg, "name": target.name, "generator": generator}
            )
        if returned is not None or given.keys() != target.params.keys():
            raise BrokenPlugin(
                f"init of variant '{self.variant.name}' returned something or added names to params; "
                "it fills the tensors of param_specs in place and returns None"
            )
        for bare, tensor in target.params.items():
            if given.get(bare) is not tensor:
                raise BrokenPlugin(
                    f"init of variant '{self.variant.name}' replaced params['{bare}']; fill it in place, with copy_()"
                )

    def remove(self, target: Target) -> None:
        for attribute in target.attributes.values():
            delattr(target.layer, attribute)
        target.attributes, target.params = {}, {}

    def group_init(self, calibration_data: Any) -> None:
        if self.variant.group_init is None:
            return
        available = {"model": self.model, "targets": tuple(self.targets), "cfg": self.cfg}
        with torch.no_grad(), leaving_no_hook(self.model, f"group_init of variant '{self.variant.name}'"):
            self.variant.group_init({**available, "calibration_data": calibration_data})
        if not self.targets:
            raise TargetError(
                f"group_init of variant '{self.variant.name}' dropped every target; nothing is left to train"
            )

    def commit(self, *, ready: bool = True) -> Record:
        """Put the hooks on; from here on the adapter runs."""
        record = Record(self.variant, self.cfg, self.seed, ready)
        prints = {
            target.name: take_fingerprint(self.variant, target.layer, target.cfg) if ready else None
            for target in self.targets
        }
        for target in self.targets:
            record.targets[target.name] = TargetRecord(
                target.d_in, target.d_out, target.cfg, target.attributes, target.saved,
                storage_of(target.layer), prints[target.name],
            )  # fmt: skip
            entry = Entry(self.name, self.variant, target.cfg, target.attributes, ready=ready)
            add_entry(target.layer, entry)
            self._hooked.append(target)
            target.close()
        return record

    def rollback(self) -> None:
        for target in self._hooked:
            remove_entry(target.layer, self.name)
        for target in self.targets:
            self.remove(target)
            target.close()


@contextmanager
def leaving_no_hook(model: nn.Module, who: str) -> Generator[None]:
    """Forward hooks that the block adds and leaves are removed, and raise BrokenPlugin unless it fails itself."""
    hooks = {m: (set(m._forward_pre_hooks), set(m._forward_hooks)) for m in model.modules()}
    left: list[str] = []
    try:
        yield
    finally:
        for name, module in model.named_modules():
            for held, before in zip((module._forward_pre_hooks, module._forward_hooks), hooks[module], strict=True):
                for key in set(held) - before:
                    del held[key]
                    left.append(name)
    if left:
        raise BrokenPlugin(f"{who} left a forward hook on {left[0]}; remove what it registers, as with an ExitStack")


@contextmanager
def making_room(model: nn.Module, name: str, variant: Variant) -> Generator[None]:
    """Inside, an adapter of that name that has no values yet (attached on meta) is off, so that another can take its
    place; it is put back if the block fails."""
    record = records_of(model).adapters.get(name)
    if record is None or record.ready:
        yield
        return
    if record.variant.name != variant.name:
        raise AdapterNameError(
            f"adapter '{name}' was attached on meta as '{record.variant.name}', this is a '{variant.name}'; "
            f"give another name, or detach(model, '{name}') first"
        )
    found = found_again(model, record)
    forget(model, name)
    try:
        yield
    except BaseException:
        install(model, record.variant, record.cfg, name, record.seed, found, deferred=True)
        raise


def found_again(model: nn.Module, record: Record) -> list[Found]:
    """The layers that an adapter is on."""
    return [
        Found(name, model.get_submodule(name), target.d_in, target.d_out, target.cfg)
        for name, target in record.targets.items()
    ]


def install(
    model: nn.Module,
    variant: Variant,
    cfg: AdapterConfig,
    name: str,
    seed: int,
    found: Iterable[Found],
    *,
    calibration_data: Any = None,
    values: Mapping[str, Mapping[str, Tensor]] | None = None,
    deferred: bool = False,
) -> None:
    """Put an adapter on these layers: with the `values` of a file, by target and bare name (those of whole modules
    under ""), or new ones, which with `deferred` wait for `Adapter.initialize`."""
    installation = Installation(model, variant, cfg, name, seed)
    originals, found = trained_tensors(model, cfg), list(found)
    whole = {other: record.originals for other, record in records_of(model).adapters.items()}
    check_untrained((*originals, *(target.name for target in found)), whole)
    unpacked = keep_unpacked(model)
    try:
        for target in found:
            installation.add(target, None if values is None else values[target.name], deferred=deferred)
        if values is None and not deferred:
            installation.group_init(calibration_data)
        record = installation.commit(ready=not deferred)
        put_copies(model, originals, None if values is None else values[""])
        record.originals = originals
        remember(model, name, record, unpacked)
    except BaseException:
        installation.rollback()
        let_pack(model, unpacked)
        raise
