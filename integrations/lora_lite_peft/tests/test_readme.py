"""What README shows is run as printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore::UserWarning")  # transformers' own
def test_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", README, flags=re.M | re.S)):
        exec(compile(block, f"README, example {number}", "exec"), names)
    found = sorted(path.name for path in (tmp_path / "hra-adapter").iterdir())
    assert found == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert not list((tmp_path / "run").rglob("model.safetensors"))
    assert len(list((tmp_path / "run").rglob("adapter_model.safetensors"))) == 2
