"""What README shows is run as printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore::UserWarning")  # transformers' own
def test_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", README, flags=re.M | re.S)):
        exec(compile(block, f"README, example {number}", "exec"), names)
    assert "was trained with r=8, and adapter 'default' has r=4" in capsys.readouterr().out
    assert not list((tmp_path / "run").rglob("model.safetensors"))
    assert len(list((tmp_path / "run").rglob("default.safetensors"))) == 2
