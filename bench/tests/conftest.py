"""What tests of the task gsm8k share: a tiny model and files of word problems, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.tests.word_problems import write_data, write_model


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The knobs `model` and `data`."""
    folder = tmp_path_factory.mktemp("gsm8k")
    return {"model": str(write_model(folder / "model")), "data": str(write_data(folder / "data"))}


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the bench keeps what it has made or read, of these tests alone."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder
