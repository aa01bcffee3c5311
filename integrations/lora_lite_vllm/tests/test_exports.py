"""What is done for a request, without a server."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from pathlib import Path

import pytest
from lora_lite_vllm import engine, exports, resolver
from lora_lite_vllm.exports import Settings, exported, file_of

import lora_lite as ll


def settings(adapters: Path, folder: Path, **more: object) -> Settings:
    return Settings(adapters, exports=folder, **more)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_file_is_exported_once_for_each_content(base: Path, adapters: Path, tmp_path: Path) -> None:
    given = settings(adapters, tmp_path)
    made = asyncio.run(exported(given, str(base), "hra"))
    assert made is not None
    config = made / "adapter_config.json"
    written = config.stat().st_mtime_ns
    assert json.loads(config.read_text(encoding="utf-8"))["r"] == 4
    assert asyncio.run(exported(given, str(base), "hra")) == made
    assert config.stat().st_mtime_ns == written
    assert [path.name for path in tmp_path.iterdir()] == [made.name]

    other = tmp_path / "adapters"
    other.mkdir()
    shutil.copy(adapters / "lora.safetensors", other / "hra.safetensors")
    assert asyncio.run(exported(settings(other, tmp_path), str(base), "hra")) != made


def test_refused_with_rank_and_error(base: Path, adapters: Path, tmp_path: Path) -> None:
    with pytest.raises(ll.MergeError) as wide:
        exports.export(adapters / "wide.safetensors", str(base), tmp_path / "wide", 16, 1e-5)
    assert "its change needs rank 24, and at the server's rank of 16 the worst layer is off by 0." in str(wide.value)
    assert "LORA_LITE_MAX_RANK, accept the error with LORA_LITE_TOL=0." in str(wide.value)
    tol = float(str(wide.value).split("LORA_LITE_TOL=")[1].split(",")[0])
    exports.export(adapters / "wide.safetensors", str(base), tmp_path / "wide", 16, tol)
    with pytest.raises(ll.MergeError, match=r"rank more than its layers have, and at the server's rank of 16 the"):
        exports.export(adapters / "oft.safetensors", str(base), tmp_path / "oft", 16, 1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["wide"]
    exports.export(adapters / "wide.safetensors", str(base), tmp_path / "again", 32, 1e-5)


@pytest.mark.slow
def test_what_a_process_of_its_own_says(adapters: Path, tmp_path: Path) -> None:
    with pytest.raises(ll.MergeError, match=r"^adapter 'lora' is not served: --base .*nowhere cannot be loaded by tra"):
        asyncio.run(exported(settings(adapters, tmp_path), str(tmp_path / "nowhere"), "lora"))


@pytest.mark.parametrize("name", ["../adapters/lora", "lora.safetensors", "", ".", "a/b", "lora\0", "x" * 101, "none"])
def test_names_are_no_paths(adapters: Path, name: str) -> None:
    assert file_of(settings(adapters, adapters), name) is None
    assert asyncio.run(exported(settings(adapters, adapters), "base", name)) is None


def test_settings(adapters: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("ADAPTERS", "MAX_RANK", "TOL", "EXPORTS"):
        monkeypatch.delenv(f"LORA_LITE_{name}", raising=False)
    assert Settings.from_environment() is None
    resolver.register()  # and imports nothing of vLLM
    assert "vllm" not in sys.modules
    monkeypatch.setenv("LORA_LITE_ADAPTERS", str(adapters))
    monkeypatch.setenv("LORA_LITE_EXPORTS", str(tmp_path))
    assert Settings.from_environment() == Settings(adapters, 16, 1e-5, tmp_path)
    for name, value in {"MAX_RANK": "0", "TOL": "-1"}.items():
        with monkeypatch.context() as one:
            one.setenv(f"LORA_LITE_{name}", value)
            with pytest.raises(ll.ConfigError, match=f"^LORA_LITE_{name}={value}: the "):
                Settings.from_environment()
    monkeypatch.setenv("LORA_LITE_ADAPTERS", str(tmp_path / "none"))
    with pytest.raises(ll.ConfigError, match=r"none: there is no such folder$"):
        resolver.register()


def test_an_engine_without_vllm_says_so(tmp_path: Path) -> None:
    if "vllm" in sys.modules:
        pytest.skip("vLLM is here")
    with pytest.raises(ll.ModelStateError, match=r"vLLM could not generate with .*\n(?s:.*)No module named 'vllm'"):
        engine.generate("base", tmp_path, [1], 1)
