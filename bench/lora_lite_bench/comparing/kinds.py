"""Whether what was read from a file is of the types that a dataclass declares."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from lora_lite_core.contract.text import plain


def check(cls: type, values: Mapping[str, Any]) -> None:
    """Raises TypeError, which names the field, for a value of another type; unknown names are not looked at."""
    kinds = get_type_hints(cls)
    for name, value in values.items():
        if name in kinds and not _is(value, kinds[name]):
            kind = getattr(kinds[name], "__name__", "") if not get_args(kinds[name]) else str(kinds[name])
            raise TypeError(f"{name} is {plain(repr(value), 60)}, and not {kind}")


def _is(value: object, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, UnionType):
        return any(_is(value, one) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(_is(one, inner[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is(k, inner[0]) and _is(v, inner[1]) for k, v in value.items())
    if kind in (int, float):
        return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    return value is None if kind is NoneType else isinstance(value, kind)
