"""The pages of docs/ are run: Python in order, commands of lora-lite too, and what they show is what is printed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from lora_lite_bench.command import bench

import lora_lite as ll
from lora_lite_core.cli import main
from lora_lite_core.cli.scaffold import new_package
from lora_lite_core.testing import run_checks

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(\S*)\n(.*?)^```$", flags=re.M | re.S)
NOT_RUN = (
    "pip install ",
    "python -m build ",
    "twine upload ",
    "python tools/measure_many.py",
)  # tests/test_packaging.py does the like
PAGES = sorted(path.name for path in DOCS.glob("*.md") if path.name != "recipes.md")  # tests/test_recipes.py
LANGUAGES = ("python", "sh", "text", "toml", "{toctree}")


def blocks(page: str) -> list[tuple[str, str]]:
    return BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))


def modules(page: str) -> dict[str, str]:
    """The Python blocks that are whole files: `# lora_lite_myssf/__init__.py` → the text under "myssf"."""
    files = {
        re.match(r"# lora_lite_(\w+)/__init__\.py\n", code): code
        for language, code in blocks(page)
        if language == "python"
    }
    return {found[1]: code for found, code in files.items() if found}


@pytest.fixture
def written(registered: Any) -> Iterator[Callable[..., types.ModuleType]]:
    """Run a text as a module of that name, and register it when it is a variant's."""
    made: list[str] = []

    def write(name: str, code: str, variant: str | None = None) -> types.ModuleType:
        module = types.ModuleType(name)
        sys.modules[name] = module
        made.append(name)
        exec(compile(code, name, "exec"), vars(module))
        if variant:
            registered(module, name=variant)
        return module

    yield write
    for name in made:
        del sys.modules[name]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs(
    page: str, written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = written("page", "")
    before, printed = "", ""
    files = modules(page)
    if "myvera" in files:
        (tmp_path / "my_method.py").write_text(files["myvera"].replace('"myvera"', '"mine"'), encoding="utf-8")
    for language, code in blocks(page):
        assert language in LANGUAGES, f"{page} has a block in {language!r}"
        if language == "python" and code in files.values():
            variant = next(name for name, text in files.items() if text == code)
            written(f"lora_lite_{variant}", code, variant)
        elif language == "python":
            exec(compile(code, page, "exec"), vars(notebook))
            printed = capsys.readouterr().out
        elif language == "sh":
            for line in code.splitlines():
                command(line)
        elif language == "text" and before == "python" and printed:
            assert code == printed, page
        before = language


def command(line: str) -> None:
    name, *arguments = shlex.split(line)
    if name == "lora-lite":
        if arguments[0] == "bench":  # takes its time: see bench/tests
            assert "lora" in bench.make_context("bench", arguments[1:]).params["variants"]
            return
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, f"{line}\n{done.output}"
        if arguments[-1].endswith(".py"):
            ll.unregister("mine")
    else:
        assert line.startswith(NOT_RUN), line


@pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=[pytest.mark.slow] if n % 4 else []) for n, name in enumerate(modules("authoring.md"))],
)
def test_the_variants_on_the_page_keep_every_promise(variant: str, written: Any) -> None:
    module = written(f"lora_lite_{variant}", modules("authoring.md")[variant], variant)
    assert [result.message for result in run_checks(module.Config()) if not result.ok] == []


def test_the_failure_that_the_page_shows(written: Any) -> None:
    code = modules("authoring.md")["myssf"]
    wrong = code.replace("return torch.addcmul(y, y, g) + beta", "return y.mul_(1 + g).add_(beta)")
    assert wrong != code
    module = written("lora_lite_myssf", wrong, "myssf")
    (result,) = run_checks(module.MySSFConfig(), only=["inputs_are_not_written"])
    shown = [re.sub(r"0\.\d+", "#", code) for _, code in blocks("authoring.md")]
    assert re.sub(r"0\.\d+", "#", f"{result.name}: {result.message}\n") in shown


def test_the_files_that_the_page_shows(tmp_path: Path) -> None:
    package = new_package("myssf", tmp_path, "Ada L.")
    (tree,) = (code for language, code in blocks("authoring.md") if language == "text" and "├──" in code)
    shown = [line.lstrip("├└─ ") for line in tree.splitlines()[1:]]
    assert sorted(shown) == sorted(str(path.relative_to(package)) for path in package.rglob("*") if path.is_file())
    (lines,) = (code for language, code in blocks("authoring.md") if language == "toml")
    assert lines in (package / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "sphinx", "-W", "-n", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "authoring.html").exists()
