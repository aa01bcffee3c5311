from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

import lora_lite as ll


@pytest.fixture
def registered() -> Iterator[Any]:
    """register(namespace, name=…) that is taken back after the test."""
    names: list[str] = []

    def register(namespace: Any, *, name: str) -> Any:
        variant = ll.register(namespace, name=name)
        names.append(name)
        return variant

    yield register
    for name in set(names):
        ll.unregister(name)


@pytest.fixture
def toy() -> SimpleNamespace:
    """A correct variant as a namespace, to be bent by a test: y + h, with h (d_out) trained from zero."""

    class Config(ll.AdapterConfig):
        variant = "toy"

    @ll.hookimpl
    def param_specs(d_out: int) -> dict[str, ll.ParamSpec]:
        return {"lora_h": ll.ParamSpec((d_out,))}

    @ll.hookimpl
    def forward(y: Tensor, params: dict[str, Tensor]) -> Tensor:
        return y + params["lora_h"].to(y.dtype)

    return SimpleNamespace(
        Config=Config, param_specs=param_specs, forward=forward, __name__="toy", __doc__="Toy: y + h."
    )
