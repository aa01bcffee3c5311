"""Wheels that were built for earlier versions of the contract run unchanged: tests/kept/contractN_NAME.whl."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

WHEELS = sorted((Path(__file__).parent / "kept").glob("*.whl"))
WORK = """
import sys, torch, lora_lite as ll
name, path = sys.argv[1:]
assert ll.list_variants()[0] and name in ll.list_variants()
model, x = torch.nn.Sequential(torch.nn.Linear(16, 16)), torch.randn(3, 16)
frozen = model(x)
adapter = ll.attach(model, ll.LoraLiteConfig(variant=name))
assert torch.equal(model(x), frozen)
for parameter in adapter.parameters():
    parameter.data.add_(0.1)
adapter.save(path)
y = model(x)
adapter.detach()
ll.load(model, path)
assert torch.equal(model(x), y)
ll.merge(model)
torch.testing.assert_close(model(x), y)
"""


@pytest.mark.slow
@pytest.mark.parametrize("wheel", WHEELS, ids=lambda path: path.name)
def test_a_plugin_for_an_earlier_contract_runs_unchanged(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "PYTHONWARNINGS": "error::UserWarning"}
    name = wheel.name.split("-")[0].removeprefix("contract2_lora_lite_")
    for command in (
        [sys.executable, "-c", WORK, name, str(tmp_path / "adapter.safetensors")],
        [sys.executable, "-m", "lora_lite_core", "check", name],
    ):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_there_is_one() -> None:
    assert [path.name for path in WHEELS] == ["contract2_lora_lite_scale-0.3.0-py3-none-any.whl"]
