"""Memory that may be read by every operation and is written by none."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class CopyOnWrite(TorchDispatchMode):
    """While it is on (in this thread), a tensor in one of these storages gets memory of its own before it is written.

    Kept apart is what torch operations declare that they write; not what compiled code writes without telling.
    """

    supports_higher_order_operators = True

    def __init__(self, storages: Collection[int]) -> None:
        super().__init__()
        self._storages = storages

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _written(func, args, kwargs):
            if storage_key(tensor) in self._storages:
                tensor.data = tensor.clone()
        return func(*args, **kwargs)


def storage_key(tensor: Tensor) -> int | None:
    """Tensors of one memory have one key; None for those without any (sparse ones, wrappers of other tensors)."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[place] if place < len(args) else kwargs.get(argument.name)
        yield from (one for one in (given if isinstance(given, (list, tuple)) else [given]) if isinstance(one, Tensor))
