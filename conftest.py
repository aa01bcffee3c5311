from __future__ import annotations

import os

# The matrices of the tests are small: more threads are no faster, and on a busy machine twenty times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

import lora_lite as ll


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--packing",
        choices=("on", "off"),
        help="bitsandbytes' 4-bit layers as on a processor with (on) or without (off) AVX512-BF16; else as on this one",
    )


def pytest_configure(config: pytest.Config) -> None:
    if packing := config.getoption("--packing"):
        from tests import four_bit

        four_bit.force(packing == "on")


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries complain at the end that their objects are left


@pytest.fixture(autouse=True)
def small_heap() -> None:
    """What has been imported is no place to look for models: attach searches the heap for what holds the model when
    something was compiled, or a 4-bit layer made, and with transformers and PEFT in it a search takes 0.2 s."""
    if len(sys.modules) != _heap["modules"]:
        gc.collect()
        gc.freeze()
        _heap["modules"] = len(sys.modules)


_heap = {"modules": 0}  # how many there were at the last freeze


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


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of sys.path to install packages in; what is imported of them is forgotten after the test."""
    from lora_lite_core.contract.variant_validation import forget
    from lora_lite_core.discovery import registry

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_loaded", {})
    yield tmp_path
    for name in [name for name, module in sys.modules.items() if str(tmp_path) in str(vars(module).get("__file__"))]:
        forget(sys.modules.pop(name))
