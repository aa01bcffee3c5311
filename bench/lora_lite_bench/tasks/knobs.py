"""Whether the values that a task's knobs were given are of their types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from lora_lite_core.contract.errors import did_you_mean
from lora_lite_core.contract.text import plain

COUNTS = ("batch_size", "steps", "test_count", "valid_count")
KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    bool: ((bool,), "true or false"),
    str: ((str,), "text"),
}


def wrong(cls: type, knobs: Mapping[str, Any]) -> str:
    """What is wrong with a value, and what to type; "" of values that are as the class declares them, by int, float,
    bool, str or a Literal. Others are its own matter."""
    try:
        kinds = get_type_hints(cls)
    except Exception:  # a package's annotations that cannot be read say nothing
        return ""
    return next(filter(None, (_wrong(name, value, kinds.get(name)) for name, value in knobs.items())), "")


def _wrong(name: str, value: Any, kind: Any) -> str:
    given = f"--knob {name}={plain(value)}"
    if name == "dtype" and kind is str and not isinstance(getattr(torch, str(value), None), torch.dtype):
        dtypes = ["float32", "bfloat16", "float16", "float64"]
        return f"{given}: a dtype of torch{did_you_mean(str(value), dtypes)}; as {', '.join(dtypes)}"
    if get_origin(kind) is Literal:
        allowed = get_args(kind)
        known = ", ".join(map(str, allowed))
        return "" if value in allowed else f"{given}: one of {known}{did_you_mean(str(value), list(map(str, allowed)))}"
    if kind not in KINDS:
        return ""
    types, called = KINDS[kind]
    if not isinstance(value, types) or (isinstance(value, bool) and kind is not bool):
        text = f"; for the text, --knob {name}='\"{plain(value)}\"'" if kind is str else ""
        return f"{given}: {called} is needed{text}"
    return f"{given}: at least 1" if name in COUNTS and value < 1 else ""
