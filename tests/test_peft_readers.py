"""Which variants are asked for a folder of PEFT's, and which packages are imported for that."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite_core.contract.variant_validation import forget
from lora_lite_core.discovery import registry

GATE = """
import lora_lite_core as core

class Config(core.AdapterConfig):
    variant = "{name}"

@core.hookimpl
def param_specs(d_out):
    return {{"lora_h": core.ParamSpec((d_out,))}}

@core.hookimpl
def forward(y, params):
    return y + params["lora_h"].to(y.dtype)

@core.hookimpl
def from_peft(config, tensors):
    {body}
"""
READS = """if config["peft_type"] != "SHIFT":
        return None
    return {}, {"lora_h": tensors["shift"]}"""
Install = Callable[[str, str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """install(distribution, variant, source): a package on sys.path, as pip would leave it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_loaded", {})

    def make(distribution: str, variant: str, source: str) -> None:
        module = distribution.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(source, encoding="utf-8")
        info = tmp_path / f"{module}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n", encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[lora_lite.variants]\n{variant} = {module}\n", encoding="utf-8")

    yield make
    for name in [name for name, module in sys.modules.items() if str(tmp_path) in str(getattr(module, "__file__", ""))]:
        forget(sys.modules.pop(name))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A LoRA's."""
    model = net()
    ll.attach(model, ll.LoRAConfig(r=2))
    ll.export_peft(model, tmp_path / "folder")
    return tmp_path / "folder"


def shift(folder: Path) -> Path:
    """The same folder, of a method that no package of ours has."""
    from safetensors.torch import save_file

    config = {"peft_type": "SHIFT", "target_modules": ["a", "b"]}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({f"base_model.model.{name}.shift": torch.ones(8) for name in "ab"}, folder / "adapter_model.safetensors")
    return folder


def gate(name: str, body: str = READS) -> str:
    return GATE.format(name=name, body=body)


def test_what_our_own_read_is_shown_to_nobody_else(install: Install, folder: Path) -> None:
    install("aaa-reads-all", "aaa", gate("aaa", "raise SystemExit('asked')") + "raise SystemExit('imported')\n")
    model = net()
    assert ll.import_peft(model, folder).record.variant.name == "lora"
    assert "aaa_reads_all" not in sys.modules


def test_only_what_may_read_is_imported(install: Install, folder: Path) -> None:
    install("no-reader", "none", gate("none").replace("from_peft", "something") + "raise SystemExit('imported')\n")
    install("zzz-reader", "zzz", gate("zzz"))
    model = net()
    expected = model["a"](torch.ones(1, 8)) + 1
    assert ll.import_peft(model, shift(folder)).record.variant.name == "zzz"
    assert torch.equal(model["a"](torch.ones(1, 8)), expected)
    assert "no_reader" not in sys.modules


BROKEN = [
    "def from_peft(): ...\nraise RuntimeError('broken')",
    gate("first", "return {'no_field': 1}, {'lora_h': tensors['shift']}"),
    "def from_peft(: ...",
    gate("first", "return 1 / 0"),
    gate("first", "return tensors['mine'], config['mine']"),
    gate("first", "return 3"),
    gate("first", "return {}, {'lora_h': 3}"),
    gate("first", "raise core.ConfigError('mine, but wrong')"),
    gate("first", "return {}, {'lora_h': tensors['shift'][:1]}"),
]


@pytest.mark.parametrize("source", [*BROKEN[:2], *(pytest.param(one, marks=pytest.mark.slow) for one in BROKEN[2:])])
def test_a_broken_package_does_not_keep_others_from_reading(source: str, install: Install, folder: Path) -> None:
    install("first", "first", source)
    install("second", "second", gate("second"))
    model = net()
    assert ll.import_peft(model, folder).record.variant.name == "lora"
    ll.detach(model)
    assert ll.import_peft(model, shift(folder)).record.variant.name == "second"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "def from_peft(): ...\nraise RuntimeError('broken')",
            r"no installed variant reads peft_type 'SHIFT' with shift \(a\)\n  variants that read PEFT's files: adalora,.*\n  left out, because they cannot be imported: first \(BrokenPlugin: variant 'first' of first 1.5 cannot be imported: RuntimeError: br",
        ),
        (
            gate("first", "return 1 / 0"),
            "a: variant 'first' cannot read its fields and tensors shift: ZeroDivisionError",
        ),
        (gate("first", "return tensors['x']"), "a: 'x' is missing, in adapter_config.json or among its tensors shift"),
        (gate("first", "raise core.ConfigError('mine, but wrong')"), "a: mine, but wrong"),
        (
            gate("first", "return {}, {'lora_h': tensors['shift'].numpy()}"),
            "a: variant 'first' cannot read its fields and",
        ),
        (
            gate("first", "return {}, {'lora_h': __import__('torch').ones(8)}"),
            "a: shift is nothing that variant 'first' reads",
        ),
    ],
)
def test_what_is_said_where_nobody_reads(source: str, message: str, install: Install, folder: Path) -> None:
    install("first", "first", source)
    with pytest.raises(ll.AdapterFileError, match=message):
        ll.import_peft(net(), shift(folder))


def test_a_blocked_package_is_not_asked(install: Install, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install("first", "first", gate("first") + "raise SystemExit('imported')\n")
    monkeypatch.setenv("LORA_LITE_BLOCK", "first")
    with pytest.raises(ll.AdapterFileError, match="no installed variant reads peft_type 'SHIFT'"):
        ll.import_peft(net(), shift(folder))


def test_one_that_was_registered_by_hand_reads(folder: Path) -> None:
    class Shift:
        class Config(ll.AdapterConfig):
            variant = "shift"

        @staticmethod
        @ll.hookimpl
        def param_specs(d_out: int) -> dict[str, ll.ParamSpec]:
            return {"lora_h": ll.ParamSpec((d_out,))}

        @staticmethod
        @ll.hookimpl
        def forward(y: torch.Tensor, params: dict[str, torch.Tensor]) -> torch.Tensor:
            return y + params["lora_h"]

        @staticmethod
        @ll.hookimpl
        def from_peft(config: dict, tensors: dict) -> tuple | None:
            return ({}, {"lora_h": dict(tensors.items())["shift"]}) if config["peft_type"] == "SHIFT" else None

    ll.register(Shift, name="shift")
    try:
        assert ll.import_peft(net(), shift(folder)).record.variant.name == "shift"
    finally:
        ll.unregister("shift")
