"""What a model remembers of its adapters: on the model itself, by name, so that copies and pickles keep it."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..contract.config import AdapterConfig
from ..contract.errors import AdapterNameError, ModelStateError, did_you_mean, listed
from ..contract.variant import Variant
from .forward_hooks import remove_entry, state_of
from .whole_modules import swap

RECORDS = "_lora_lite_adapters"


@dataclass
class TargetRecord:
    """What the model remembers of one target: enough to save it and to take it off."""

    d_in: int
    d_out: int
    cfg: AdapterConfig
    attributes: dict[str, str]  # bare name → attribute of the layer
    saved: tuple[str, ...]  # the bare names that go into a file
    storage: str = "dense"
    fingerprint: list[float] | None = None


@dataclass
class Record:
    """What the model remembers of one adapter."""

    variant: Variant
    cfg: AdapterConfig
    seed: int
    ready: bool = True
    targets: dict[str, TargetRecord] = field(default_factory=dict)
    originals: dict[str, Tensor] = field(default_factory=dict)  # of the base, while `train_modules` has copies there


@dataclass
class Records:
    """On the model, by name: its adapters, and the parameters and packing flags that `attach` turned off."""

    adapters: dict[str, Record] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    unpacked: list[str] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)  # "disabled", "merged": the with-blocks that we are in


def records_of(model: nn.Module) -> Records:
    if not isinstance(model, nn.Module):
        raise ModelStateError(f"the first argument is the model, an nn.Module, not {type(model).__name__}")
    return model.__dict__.get(RECORDS) or Records()


@contextmanager
def inside(model: nn.Module, block: str) -> Generator[None]:
    """A with-block in which the model's adapters stand still."""
    blocks = records_of(model).blocks
    blocks.append(block)
    try:
        yield
    finally:
        blocks.remove(block)


def check_outside(model: nn.Module, *blocks: str) -> None:
    """Raise ModelStateError inside one of these blocks ("disabled", "merged"; none given: both)."""
    for block in reversed(records_of(model).blocks):
        if block in (blocks or ("disabled", "merged")):
            raise ModelStateError(f"not inside `with {block}(model)`: leave that block first")


def names_of(model: nn.Module, name: str | None) -> list[str]:
    """The one name, or all of them for None; AdapterNameError when there is none."""
    names = [name] if name is not None else list(records_of(model).adapters)
    for one in names or ["default"]:
        record_of(model, one)
    return names


def record_of(model: nn.Module, name: str) -> Record:
    records = records_of(model).adapters
    if name in records:
        return records[name]
    inner = [path for path, module in model.named_modules() if path and RECORDS in module.__dict__]
    hint = f"\n  submodule '{inner[0]}' carries adapters: pass model.{inner[0]}" if inner else ""
    near = did_you_mean(name, records)
    only = f"; give name='{next(iter(records))}'" if len(records) == 1 and not near else ""
    raise AdapterNameError(f"no adapter is called '{name}'{near}{only}\n  attached: {listed(records)}{hint}")


def remember(model: nn.Module, name: str, record: Record, unpacked: list[str]) -> None:
    """Write the record on the model and freeze what is not an adapter."""
    records = model.__dict__.setdefault(RECORDS, Records())
    records.unpacked.extend(unpacked)
    records.adapters[name] = record
    ours = {id(p) for layer in model.modules() for p in _adapter_parameters(layer)}
    whole = {key for one in records.adapters.values() for key in one.originals}
    for parameter_name, parameter in model.named_parameters():
        if id(parameter) not in ours and parameter_name not in whole and parameter.requires_grad:
            parameter.requires_grad_(False)
            records.frozen.append(parameter_name)


def _adapter_parameters(layer: nn.Module) -> Iterator[nn.Parameter]:
    state = state_of(layer)
    for entry in state.entries if state else ():
        yield from (p for p in entry.params(layer).values() if isinstance(p, nn.Parameter))


def forget(model: nn.Module, name: str) -> Record:
    """Take the adapter's tensors and hooks off, and its record."""
    records = records_of(model)
    record = records.adapters.pop(name)
    swap(model, record.originals)
    for key, parameter in model.named_parameters() if records.adapters else ():
        if key in record.originals and parameter.requires_grad:  # for the adapters that stay it is base
            parameter.requires_grad_(False)
            records.frozen.append(key)
    for layer_name, target in record.targets.items():
        try:
            layer = model.get_submodule(layer_name)
        except AttributeError:  # the user has removed the layer
            continue
        remove_entry(layer, name)
        for attribute in target.attributes.values():
            if hasattr(layer, attribute):  # not so where the user has replaced the whole layer
                delattr(layer, attribute)
    return record


def check_one_owner(model: nn.Module) -> None:
    """Raise ModelStateError when adapters were attached through another module than this one."""
    ours = records_of(model).adapters
    for path, module in model.named_modules():
        if path and RECORDS in module.__dict__:
            raise ModelStateError(f"submodule '{path}' carries adapters of its own; attach to one and the same module")
        for entry in state.entries if (state := state_of(module)) else ():
            if entry.name not in ours:
                raise ModelStateError(
                    f"'{path}' carries adapter '{entry.name}', which was attached through an enclosing module; "
                    "attach to that one"
                )


def check_name(model: nn.Module, name: str) -> None:
    if not isinstance(name, str) or not name.isidentifier() or "__" in name:
        raise AdapterNameError(
            f"{name!r} is not an adapter name; use letters, digits and single underscores, as in 'style_2'"
        )
    taken = records_of(model).adapters
    if name in taken:
        raise AdapterNameError(
            f"an adapter called '{name}' is attached already; detach(model, '{name}') first, or give another name\n"
            f"  attached: {listed(taken)}"
        )
