"""Products with fused experts, followed from the call that the module makes to the rows of every expert.

What is not understood is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...contract.errors import UnsupportedLayer
from ...contract.target import Params, Target
from ...contract.variant import Hook
from ...layers.kinds.experts import Experts, bias_name, expert, experts_in, keeps_transposed
from .expert_rows import Rows, rows_for
from .layer_state import run, targets_on

LISTENERS = "_lora_lite_listeners"  # on a twin: by part
_ASKED = frozenset(("__get__", "dim", "size", "stride", "data_ptr", "is_contiguous", "numel", "ndimension", "__len__"))
_KEPT = frozenset(("to", "contiguous", "type_as", "squeeze", "float", "bfloat16", "half"))
_TURNS = ("transpose", "swapaxes", "adjoint")
_GROUPED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")


@dataclass(frozen=True)
class Note:
    """What a Traced tensor is of."""

    layer: nn.Module
    part: str
    targets: tuple[Target, ...]
    used: dict[str, bool]  # by part: whether it was multiplied with
    kind: str = "weight"  # or "bias", "product", to which a bias is still to be added, "done", to which it was
    experts: Any = None  # None: all of them; a number, or a tensor with one, or with one for every row
    turned: bool = False  # the last two dimensions are the other way round
    x: Any = None  # of a product
    rows: Any = None


class Traced(Tensor):
    """A tensor of fused experts on its way through their forward."""

    note: Note

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _follow(func, args, kwargs or {})


def view_of(tensor: Any, note: Note) -> Traced:
    made: Traced = tensor.as_subclass(Traced)
    made.note = note
    return made


def _follow(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = getattr(func, "__name__", "") or str(func).rpartition(".")[2]
    given = [*args, *kwargs.values()]
    traced = next(one for one in given if isinstance(one, Traced))
    note = traced.note
    if note.kind == "done":
        return func(*args, **kwargs)
    if name in _ASKED:
        found = func(*args, **kwargs)
        return found if not isinstance(found, Tensor) else _turn(func, found, note)
    if note.kind == "product" or any(isinstance(one, Traced) and one.note.kind == "product" for one in given):
        return _finish(func, name, args, kwargs)
    if name == "__getitem__" and note.experts is None and isinstance(args[1], (int, Tensor)):
        return view_of(func(*args), replace(note, experts=args[1]))
    if name in _KEPT and traced is args[0]:
        return view_of(func(*args, **kwargs), note)
    if name in _TURNS and {*args[1:]} <= {-2, -1, traced.dim() - 2, traced.dim() - 1}:
        return view_of(func(*args, **kwargs), replace(note, turned=not note.turned))
    if note.kind == "weight":
        return _multiply(func, name, args, kwargs)
    raise _unknown(name, note)


def _turn(func: Any, found: Tensor, note: Note) -> Tensor:
    """Of properties that are tensors only `.mT`, and `.T` of one expert, are understood."""
    if getattr(getattr(func, "__self__", None), "__name__", "") in ("mT", "T") and found.dim() <= 3:
        return view_of(found, replace(note, turned=not note.turned))
    raise _unknown("a property", note)


def _unknown(name: str, note: Note) -> UnsupportedLayer:
    return UnsupportedLayer(
        f"a {type(note.layer).__name__} uses its {note.part} in a way ('{name}') that adapters on it do not follow; "
        "choose another experts_implementation, or leave it out with exclude_names"
    )


def _multiply(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """x times the experts' weight, by the call that the module makes, between the two sides of the adapters."""
    given = dict(enumerate(args)) | kwargs
    key = next(key for key, one in given.items() if isinstance(one, Traced))
    weight = given[key]
    note: Note = weight.note
    x_key = next((k for k, one in given.items() if isinstance(one, Tensor) and k != key), None)
    if x_key is None or name not in ("linear", "matmul", "mm", "bmm", "__matmul__", *_GROUPED):
        raise _unknown(name, note)
    inner = given[key].shape[-1] if (name == "linear" or key == 0) else given[key].shape[-2]
    rows = rows_for(name, note.experts, given[x_key], kwargs.get("offs", given.get(2)) if name in _GROUPED else None)
    if rows is None or inner != _sizes(note).d_in or _side(name, key) != _kept(note):
        raise _unknown(name, note)
    note.used[note.part] = True
    x = rows.flat(given[x_key])
    for target in note.targets:
        if target.variant.forward_input is not None:
            x = _each(note, rows, target, "forward_input", x, None)
    given[x_key] = rows.shaped(x, given[x_key])
    bias = next((k for k, one in given.items() if isinstance(one, Traced) and one.note.kind == "bias"), None)
    y = func(*[given[k] for k in range(len(args))], **{k: given[k] for k in kwargs})
    if bias_name(note.layer, note.part) and bias is None:
        return view_of(y, replace(note, kind="product", x=x, rows=rows))
    return rows.shaped(_outputs(note, rows, x, rows.flat(y)), y)


def _sizes(note: Note) -> Experts:
    found = experts_in(note.layer, note.part)
    return Experts(0, 0, 0) if found is None else found


def _side(name: str, key: Any) -> bool:
    """Whether a call takes the weight as (…, d_out, d_in): F.linear does, and a product with the weight on the left."""
    return name == "linear" or (key == 0 and name not in _GROUPED)


def _kept(note: Note) -> bool:
    """Whether it is so kept, as it comes to the call."""
    return bool(keeps_transposed(note.layer)) == note.turned


def _finish(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A product on its way to its bias; there the adapters see what a linear layer would return."""
    product = next(one for one in args if isinstance(one, Traced) and one.note.kind == "product")
    note: Note = product.note
    if name in _KEPT and product is args[0]:
        return view_of(func(*args, **kwargs), note)
    if name not in ("add", "add_", "__add__", "__iadd__", "__radd__") or not any(
        isinstance(one, Traced) and one.note.kind == "bias" for one in args
    ):
        raise _unknown(name, note)
    left, right = args[:2]
    y = left + right if name.endswith("add_") else func(left, right, **kwargs)
    y = note.rows.shaped(_outputs(note, note.rows, note.x, note.rows.flat(y)), y)
    if not name.endswith("add_"):
        return y
    left.copy_(y)  # the caller goes on with the product, and not with what is returned
    product.note = replace(note, kind="done")
    return product


def _outputs(note: Note, rows: Rows, x: Tensor, y: Tensor) -> Tensor:
    for target in note.targets:
        if target.variant.forward is not None:
            y = _each(note, rows, target, "forward", x, y)
    listener = vars(note.layer).get(LISTENERS, {}).get(note.part)
    return y if listener is None else rows.each(_sizes(note).number, listener, x, y)


def _each(note: Note, rows: Rows, target: Target, side: str, x: Tensor, y: Tensor | None) -> Tensor:
    """One side of an adapter on the rows of every expert."""
    hook: Hook = getattr(target.variant, side)
    try:
        params = target.params_on(note.layer)
    except (AttributeError, KeyError):
        if target in targets_on(note.layer):
            raise
        return x if y is None else y  # taken off by another thread during this call

    def run_one(index: Any, x: Tensor, y: Tensor | None) -> Tensor:
        own = target.of_expert(params, index)
        layer = expert(note.layer, note.part, index) if "layer" in hook.argnames else note.layer
        return run(hook, side, layer, replace(target, seen=Params(own)), x, y)

    return rows.each(target.experts, run_one, x, y)
