"""`lora-lite new` writes a package that works as it is."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import lora_lite as ll
from lora_lite_core.cli import main
from lora_lite_core.cli.scaffold import FILES, new_package
from lora_lite_core.testing import run_checks


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return new_package("my-gain", tmp_path, "Ada L.")


def test_what_is_written(package: Path) -> None:
    assert package.name == "lora-lite-my-gain"
    assert len([path for path in package.rglob("*") if path.is_file()]) == len(FILES)
    for path in package.rglob("*"):
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"\$[a-z]", text), path
            if path.suffix == ".py":
                compile(text, str(path), "exec")
    assert "python-version: ${{ matrix.python }}" in (package / ".github/workflows/test.yml").read_text(
        encoding="utf-8"
    )
    readme = (package / "README.md").read_text(encoding="utf-8")
    assert "ll.MyGainConfig(r=4)" in readme
    assert "author = {Ada L.}" in readme


def test_the_project_file(package: Path) -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == "lora-lite-my-gain"
    assert project["dependencies"] == ["lora-lite-core>=0.1,<0.2"]
    assert project["entry-points"]["lora_lite.variants"] == {"my_gain": "lora_lite_my_gain"}
    assert project["authors"] == [{"name": "Ada L."}]


def test_the_variant_keeps_every_promise(package: Path, registered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(package))
    module = importlib.import_module("lora_lite_my_gain")
    try:
        registered(module, name="my_gain")
        assert [result.message for result in run_checks(module.MyGainConfig(r=4)) if not result.ok] == []
    finally:
        del sys.modules["lora_lite_my_gain"]


@pytest.mark.parametrize("like", ["lora", "antipasto", "hra", "ia3"])  # all kinds: with and without r and helpers
def test_a_copy_of_a_variant_works(like: str, tmp_path: Path, registered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    package = new_package("my-copy", tmp_path, "Ada L.", like)
    monkeypatch.syspath_prepend(str(package))
    module = importlib.import_module("lora_lite_my_copy")
    try:
        registered(module, name="my_copy")
        fields = re.search(r"MyCopyConfig\((.*)\)\)", (package / "tests/test_my_copy.py").read_text(encoding="utf-8"))
        assert fields
        cfg = eval(f"module.MyCopyConfig({fields[1]})")
        only = ["config_survives_json", "identity_at_start", "loss_falls", "reload_on_a_fresh_model"]
        assert [result.message for result in run_checks(cfg, only=only) if not result.ok] == []
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "lora_lite_my_copy"]:
            del sys.modules[name]
    assert not hasattr(module, "to_peft")
    assert f"begun as a copy of {like}" in str(module.__doc__).partition("\n")[0]
    assert "Ada L.\nCopyright (c) 2026 The lora-lite developers" in (package / "LICENSE").read_text(encoding="utf-8")


def test_capitals_are_kept(tmp_path: Path) -> None:
    package = new_package("My-LoRA", tmp_path, "Ada L.")
    assert package.name == "lora-lite-my-lora"
    text = (package / "lora_lite_my_lora/__init__.py").read_text(encoding="utf-8")
    assert text.startswith('"""My-LoRA: ')
    assert "class MyLoRAConfig(LowRankConfig)" in text
    assert 'variant = "my_lora"' in text


def test_copies_of_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        ll.ConfigError,
        match="--from hrra: not a variant of this project; choose from adalora, alora, corda",
    ):
        new_package("my-copy", tmp_path, "Ada L.", "hrra")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("2fast", "'2fast' cannot be the name of a variant; use letters, digits and single dashes: my-variant"),
        ("my--gain", "cannot be the name of a variant"),
        ("lambda", "'lambda' cannot be the name of a variant: 'lambda' is a keyword of Python"),
        ("lora-lite-Class", "'lora-lite-Class' cannot be the name of a variant: 'class' is a keyword of Python"),
        ("x" * 51, "cannot be the name of a variant; .*my-variant \\(at most 50\\)"),
        ("gain\x1b[2J", "cannot be the name of a variant"),
        ("pissa", "a variant called 'pissa' exists already, in lora-lite-svd"),
    ],
)
def test_names_that_are_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ll.ConfigError, match=message):
        new_package(name, tmp_path, "Ada L.")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "author", ['Ada "L"', "Ada\nL", "Ada\x1b[2J", "\u202eadA", "A}", "\ud800", "\0", " ", "A" * 201]
)
def test_authors_that_would_break_the_project_file(author: str, tmp_path: Path) -> None:
    with pytest.raises(ll.ConfigError, match="give a name without quotation marks"):
        new_package("my-gain", tmp_path, author)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("author", ["Zoë 你好", "$year ${core}", "<b>&", "# = ' {", "علی\u200cرضا"])
def test_authors_are_written_as_they_are(author: str, tmp_path: Path) -> None:
    author = author.replace("{", "(").replace("}", ")")
    tomllib = pytest.importorskip("tomllib")
    package = new_package("my-gain", tmp_path, author)
    project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["authors"] == [{"name": author}]
    assert author in (package / "LICENSE").read_text(encoding="utf-8")


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", "x")

    monkeypatch.setattr("tempfile.mkdtemp", refused)
    done = CliRunner().invoke(main, ["new", "my-gain", "--folder", str(tmp_path)])
    assert done.exit_code == 1
    assert done.output == f"Error: {tmp_path} cannot be written: Permission denied\n"


def test_the_command(tmp_path: Path) -> None:
    arguments = ["new", "lora-lite-my-gain", "--folder", str(tmp_path), "--from", "hra"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert str(tmp_path / "lora-lite-my-gain/pyproject.toml") in done.output
    assert "pip install -e '.[test]'; pytest" in done.output
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 1
    assert "exists already; give another name or --folder" in again.output
