"""The hooks of fused experts: each product with a parameter of theirs is one of linear layers with adapters.

While the module's forward runs, its parameters are `Traced`: views of the same memory that see what is done with them.
Whatever way the module multiplies (one expert after the other, gathered for every row, grouped), the product is
computed by the very call it makes, and the adapters of the experts in question get its rows. What is not understood is
an error. Nothing of it is left on the module after the call.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...contract.errors import UnsupportedLayer
from ...contract.target import Params, Target
from ...contract.variant import Hook
from ...layers.kinds.experts import Experts, bias_name, expert, experts_in, keeps_transposed
from .expert_rows import Rows, Run, rows_for
from .layer_state import run, state_of, targets_on

LISTENERS = "_lora_lite_listeners"  # on a twin: by part
OPEN = "_lora_lite_open"  # on the module: the threads that are in its forward
_ASKED = frozenset(("__get__", "dim", "size", "stride", "data_ptr", "is_contiguous", "numel", "ndimension", "__len__"))
_KEPT = frozenset(("to", "contiguous", "type_as", "squeeze", "float", "bfloat16", "half"))
_TURNS = ("transpose", "mT", "T", "swapaxes", "adjoint")
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


def before_experts(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
    state, listeners = state_of(layer), vars(layer).get(LISTENERS, {})
    on = tuple(target for target in state.targets if target.enabled) if state is not None else ()
    used: dict[str, bool] = {}
    for part in dict.fromkeys((*(target.part for target in on), *listeners)):
        targets = tuple(target for target in on if target.part == part)
        used[part] = False
        note = Note(layer, part, targets, used)
        vars(layer)[part] = _traced(layer._parameters[part], note)
        if bias := bias_name(layer, part):
            vars(layer)[bias] = _traced(layer._parameters[bias], Note(layer, part, targets, used, "bias"))
    if not torch.compiler.is_compiling():
        vars(layer).setdefault(OPEN, set()).add(threading.get_ident())


def listen(layer: nn.Module, part: str, call: Run) -> None:
    """Have every expert's number, rows and outputs seen before they leave its product; for a module that is run apart
    (a twin). The call returns the outputs."""
    if state_of(layer) is None and LISTENERS not in vars(layer):
        layer.register_forward_pre_hook(before_experts, with_kwargs=True)
        layer.register_forward_hook(after_experts, with_kwargs=True, always_call=True)
    vars(layer).setdefault(LISTENERS, {})[part] = call


def after_experts(layer: nn.Module, args: tuple[Any, ...], kwargs: Any, y: Any = None) -> None:
    """Also when the forward fails; another thread that is still in it keeps its view of the parameters."""
    held = vars(layer)
    if not torch.compiler.is_compiling():
        threads = held.get(OPEN, set())
        threads.discard(threading.get_ident())
        if threads:
            return
        held.pop(OPEN, None)
    notes = [held.pop(name).note for name in [*layer._parameters] if name in held]
    if y is None or not (args and isinstance(args[0], Tensor) and args[0].numel()):
        return
    if unused := [note.part for note in notes if note.kind == "weight" and not note.used[note.part]]:
        raise UnsupportedLayer(
            f"a {type(layer).__name__} ran without multiplying by its {unused[0]}, so that adapters on it did "
            "nothing; choose another experts_implementation, or leave it out with exclude_names"
        )


def _traced(tensor: Any, note: Note) -> Traced:
    made: Traced = tensor.as_subclass(Traced)
    made.note = note
    return made


def _with(note: Note, **changes: Any) -> Note:
    kept = {name: getattr(note, name) for name in Note.__dataclass_fields__}
    return Note(**{**kept, **changes})


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
        return _traced(func(*args), _with(note, experts=args[1]))
    if name in _KEPT and traced is args[0]:
        return _traced(func(*args, **kwargs), note)
    if name in _TURNS and {*args[1:]} <= {-2, -1, traced.dim() - 2, traced.dim() - 1}:
        return _traced(func(*args, **kwargs), _with(note, turned=not note.turned))
    if note.kind == "weight":
        return _multiply(func, name, args, kwargs)
    raise _unknown(name, note)


def _turn(func: Any, found: Tensor, note: Note) -> Tensor:
    """Of properties that are tensors only `.mT`, and `.T` of one expert, are understood."""
    if getattr(getattr(func, "__self__", None), "__name__", "") in ("mT", "T") and found.dim() <= 3:
        return _traced(found, _with(note, turned=not note.turned))
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
        return _traced(y, _with(note, kind="product", x=x, rows=rows))
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
        return _traced(func(*args, **kwargs), note)
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
    product.note = _with(note, kind="done")
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
        own = {bare: tensor if bare in target.shared else tensor[index] for bare, tensor in params.items()}
        layer = expert(note.layer, note.part, index) if "layer" in hook.argnames else note.layer
        return run(hook, side, layer, replace(target, seen=Params(own)), x, y)

    return rows.each(target.experts, run_one, x, y)
