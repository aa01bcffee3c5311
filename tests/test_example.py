"""The example package against this checkout: what it is asked by its own tests."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_lite_core.testing import run_checks

EXAMPLE = Path(__file__).parents[1] / "examples/lora-lite-scale"


def test_the_example_keeps_every_promise(registered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    module = importlib.import_module("lora_lite_scale")
    try:
        registered(module, name="scale")
        own = (EXAMPLE / "tests/test_scale.py").read_text(encoding="utf-8")
        assert "@variant_checks(ScaleConfig(block=8))" in own
        assert [result.message for result in run_checks(module.ScaleConfig(block=8)) if not result.ok] == []
    finally:
        del sys.modules["lora_lite_scale"]


@pytest.mark.slow
def test_the_probe_of_a_real_model() -> None:
    """On a tiny one that is made on the spot."""
    script = EXAMPLE.parent / "qwen_probe.py"
    done = subprocess.run([sys.executable, script, "--steps", "4"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(re.findall(r"^\w+: loss .* reloaded$", done.stdout, flags=re.M)) == 3
