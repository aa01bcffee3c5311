"""bitsandbytes 4-bit layers on processors with AVX512-BF16: their first evaluation rearranges the weight in place.

A rearranged layer has no gradient and dequantises to garbage, without a word. The flag that asks for it is turned off
while adapters are on the model. A layer that is rearranged already is put back, for good: rearranged once more, it
would be scrambled by bitsandbytes when it is saved.
"""

from __future__ import annotations

import copy
import gc
import importlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..contract.errors import ModelStateError
from ..contract.text import count
from .kinds.layer_kinds import is_a

FLAG = "support_avx512bf16_for_cpu"
PREPARED = "_lora_lite_prepared"  # on a layer: its flag stays off


def prepare(model: nn.Module) -> int:
    """Keep 4-bit layers as they are from now on, for good; call it before a baseline is evaluated. The number changed.

    Only bitsandbytes 4-bit layers on processors with AVX512-BF16 need it, and `attach` does it, too: what it cannot put
    back exactly is the second rounding (to bfloat16) of the block scales that an earlier evaluation has done. With
    adapters on the model it holds beyond `detach`. Raises ModelStateError as `attach` does, and then changes nothing.
    """
    plan = Unpacking(model)
    plan.apply()
    for _, layer in _four_bit_layers(model):
        setattr(layer, PREPARED, True)
    return len(plan.changes)


class Unpacking:
    """What keeps a model's 4-bit layers as they are: computed here, without touching any; `apply` and `undo` may be
    called again and again, and after an interrupt anywhere in them the next `undo` (or `apply`) makes it whole. While
    a rearranged layer is put back, no other thread may run it (`prepare` before the first forward spares that).

    model    any module
    changes  of the layers that would rearrange themselves, or have done so
    names    of those that may do so again when no adapter is left: what `let_pack` takes

    Raises ModelStateError for a layer that cannot be put back, and for layers outside of the model that would
    rearrange themselves while the model is a part of something larger.
    """

    def __init__(self, model: nn.Module) -> None:
        _check_around(model)
        found = [(name, layer, _put_back(name, layer)) for name, layer in _four_bit_layers(model)]
        self.changes = [_Change(*one) for one in found if _packs(one[1])]
        self.names = [c.name for c in self.changes if c.after is None and not getattr(c.layer, PREPARED, False)]

    def apply(self) -> None:
        """Turn the flags off, put rearranged weights back; all of it or, when it is interrupted, nothing."""
        try:
            for change in self.changes:
                setattr(change.layer, FLAG, False)
                change.put(change.after)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Everything as it was before `apply`."""
        for change in self.changes:
            change.put(change.before)
            setattr(change.layer, FLAG, change.flag)


def let_pack(model: nn.Module, names: Iterable[str], flag: bool = True) -> None:
    """Turn the flag on again, on those of them that are still there and not prepared for good."""
    layers = dict(_four_bit_layers(model))
    for layer in (layers[name] for name in names if name in layers):
        if hasattr(layer, FLAG) and not getattr(layer, PREPARED, False):
            setattr(layer, FLAG, flag)


def unpack(layer: nn.Module) -> None:
    """Put one layer (a twin) back if it is rearranged and can be; not for layers that others run."""
    for name, found in _four_bit_layers(layer):
        with suppress(ModelStateError):  # then it runs as it is, roughly
            after = _put_back(name, found)
            _Change(name, found, after).put(after)


def read_bitsandbytes(layer: Any) -> Tensor | None:
    """The dense weight of a 4-bit or 8-bit layer, (d_out, d_in), by bitsandbytes' own functions; None where it has not
    been quantised yet, or is rearranged."""
    functional = importlib.import_module("bitsandbytes.functional")
    weight, state = layer.weight, getattr(layer, "state", None)
    if is_a(layer, "bitsandbytes.Linear4bit"):
        packed = getattr(weight, "quant_state", None) is None or _is_packed(layer)
        return None if packed else functional.dequantize_4bit(weight.data, weight.quant_state)
    codes, scales = (getattr(weight, key, None) for key in ("CB", "SCB"))
    codes, scales = (getattr(state, "CB", None), getattr(state, "SCB", None)) if scales is None else (codes, scales)
    return None if codes is None or scales is None else functional.int8_vectorwise_dequant(codes, scales)


@dataclass
class _Weight:
    codes: Tensor
    state: Any


@dataclass
class _Change:
    name: str
    layer: nn.Module
    after: _Weight | None  # where the layer is rearranged

    def __post_init__(self) -> None:
        weight: Any = self.layer.weight
        self.flag = getattr(self.layer, FLAG, False)
        self.before = None if self.after is None else _Weight(weight.data, weight.quant_state)

    def put(self, wanted: _Weight | None) -> None:
        if wanted is not None:
            weight: Any = self.layer.weight
            weight.data, weight.quant_state = wanted.codes, wanted.state
            self.layer.quant_state = wanted.state


def _four_bit_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, layer) for name, layer in model.named_modules() if is_a(layer, "bitsandbytes.Linear4bit"))


def _put_back(name: str, layer: nn.Module) -> _Weight | None:
    """The codes, permuted back bit for bit, and the scales as the evaluation has rounded them; nothing is written."""
    weight: Any = layer.weight
    if not _is_packed(layer):
        return None
    try:
        functional = importlib.import_module("bitsandbytes.functional")
        state = copy.copy(weight.quant_state)
        scales = state.absmax.T.reshape(-1).float()
        state.original_nested = False  # its own way back would quantise the scales again
        codes, state = functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
        state.absmax, state.nested, state.offset, state.state2 = scales, False, None, None
        packed, _ = functional._convert_weight_packed_for_cpu(codes, copy.copy(state))
        exact = torch.equal(packed, weight.data)
    except (ImportError, AttributeError, AssertionError, RuntimeError) as error:
        raise _refusal(name) from error
    if not exact:
        raise _refusal(name)
    return _Weight(codes, state)


def _is_packed(layer: nn.Module) -> bool:
    return bool(getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False))


def _packs(layer: nn.Module) -> bool:
    return getattr(layer, FLAG, False) or _is_packed(layer)


def _refusal(name: str) -> ModelStateError:
    return ModelStateError(
        f"{name} (bitsandbytes 4-bit) was rearranged for AVX512-BF16 by an earlier evaluation and cannot be put back: "
        "its gradients would be wrong; load the model again and call ll.prepare(model) before the first forward"
    )


def _check_around(model: nn.Module) -> None:
    """Refuse 4-bit layers outside of the model that pass its adapters no gradient once they are rearranged."""
    library = sys.modules.get("bitsandbytes.nn.modules")
    if library is None or not library.has_avx512bf16() or not any(p.is_cpu for p in model.parameters()):
        return
    inside = {id(module) for module in model.modules()}
    if not any(True for _ in _four_bit_layers(model)) and not _any_alive(library.Linear4bit):
        return
    for root in _enclosing(model):
        outside = [(name, layer) for name, layer in _four_bit_layers(root) if id(layer) not in inside]
        if found := [name for name, layer in outside if layer.weight.is_cpu and _packs(layer)]:
            raise ModelStateError(
                f"the {type(model).__name__} is a part of a {type(root).__name__} with "
                f"{count(len(found), '4-bit layer')} outside of it ({found[0]}), which an evaluation on this processor "
                "(AVX512-BF16) rearranges: what is trained before them would get wrong gradients; call ll.prepare with "
                f"the {type(root).__name__} first, or attach to it"
            )


_counts: dict[type, int] = {}  # references to a class when there was no object of it


def _any_alive(kind: type) -> bool:
    """Whether there is an object of this class, or of one derived from it. A search among all objects takes some
    hundredths of a second; while nobody has taken a new reference to the classes, there is no new object either."""
    kinds = {kind}
    while more := {one for known in kinds for one in known.__subclasses__()} - kinds:
        kinds |= more
    counted = getattr(sys, "_is_gil_enabled", lambda: True)()  # without it, references to classes are not counted
    if counted and all(sys.getrefcount(one) == _counts.get(one) for one in kinds):
        return False
    alive = not kinds.isdisjoint(map(type, gc.get_objects()))
    _counts.update({one: -1 if alive else sys.getrefcount(one) for one in kinds})
    return alive


def _enclosing(model: nn.Module) -> list[nn.Module]:
    """All modules that the model is a part of. A search among all objects for each: hundredths of a second."""
    found: list[nn.Module] = []
    here: list[nn.Module] = [model]
    while here:
        above = _parents(here.pop())
        new = [module for module in above if module is not model and all(module is not one for one in found)]
        found.extend(new)
        here.extend(new)
    return found


def _parents(module: nn.Module) -> list[nn.Module]:
    children = [held for held in gc.get_referrers(module) if type(held) is dict and _holds_modules(held)]
    if not children:
        return []
    holders = gc.get_referrers(*children)  # the parents themselves, or their __dict__
    spaces = [one for one in holders if type(one) is dict and any(one.get("_modules") is held for held in children)]
    holders += gc.get_referrers(*spaces) if spaces else []
    return [one for one in holders if issubclass(type(one), nn.Module) and module in one._modules.values()]


def _holds_modules(held: dict[Any, Any]) -> bool:
    return all(value is None or issubclass(type(value), nn.Module) for value in list(held.values()))
