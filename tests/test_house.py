"""House rules that a test can see."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from importlib_metadata import distributions

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
MEMBERS = [*sorted((ROOT / "plugins").iterdir()), *sorted((ROOT / "integrations").iterdir())]
PROJECTS = [ROOT, *MEMBERS, ROOT / "bench", ROOT / "meta"]
sys.path.insert(0, str(ROOT / "tools"))

from reduce_lock import main as reduce_lock_main  # noqa: E402
from reduce_lock import reduce  # noqa: E402


def project(folder: Path) -> dict:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize(
    "path",
    sorted([*(ROOT / "lora_lite_core").rglob("*.py"), *ROOT.glob("integrations/*/lora_lite_*/*.py")]),
    ids=lambda p: p.name,
)
def test_core_files_are_short(path: Path) -> None:
    assert lines(path) < 250


def test_core_folders_have_few_entries() -> None:
    folders = [ROOT / "lora_lite_core", *(path.parent for path in (ROOT / "lora_lite_core").rglob("__init__.py"))]
    for folder in set(folders):
        modules = [path for path in folder.glob("*.py") if not path.name.startswith("__")]
        packages = [path.parent for path in folder.glob("*/__init__.py")]
        assert len(modules) + len(packages) <= 9, folder


def test_the_floors_of_the_core() -> None:
    """Each folder imports only from those below it, and there is no circle of modules; types count as well."""
    done = subprocess.run(
        ["lint-imports", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_COLOR": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("path", sorted(ROOT.glob("plugins/*/lora_lite_*/*.py")), ids=lambda p: p.name)
def test_variants_are_short(path: Path) -> None:
    assert lines(path) < 100


def test_the_example_is_shorter_still() -> None:
    assert lines(ROOT / "examples/lora-lite-scale/lora_lite_scale/__init__.py") <= 30


def test_one_version_and_ranges_that_fit_it() -> None:
    versions = {project(folder)["version"] for folder in PROJECTS}
    assert len(versions) == 1
    major, minor, _ = versions.pop().split(".")
    wanted = f">={major}.{minor},<{major}.{int(minor) + 1}"
    for folder in PROJECTS[1:]:
        ours = [d for d in project(folder)["dependencies"] if d.startswith("lora-lite")]
        assert any(d == f"lora-lite-core{wanted}" for d in ours), folder
        assert all(d.endswith(wanted) for d in ours), folder


def test_every_distribution_has_a_licence_a_readme_and_types() -> None:
    for folder in PROJECTS:
        assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
        assert len((folder / "README.md").read_text(encoding="utf-8")) > 100
    packages = [
        ROOT / "lora_lite_core",
        ROOT / "lora_lite",
        ROOT / "bench/lora_lite_bench",
        *ROOT.glob("plugins/*/lora_lite_*"),
        *ROOT.glob("integrations/*/lora_lite_*"),
    ]
    assert all((package / "py.typed").exists() for package in packages)


def test_the_core_names_no_method() -> None:
    """Apart from the table behind the `pip install …` hint and examples in docstrings and messages."""
    methods = re.compile(r"\b(pissa|ia3|ia3_ff|lora_lite_(lora|svd|ortho)|lora-lite-(lora|svd|ortho))\b")
    for path in (ROOT / "lora_lite_core").rglob("*.py"):
        source = re.sub(r'""".*?"""|_PACKAGES = {.*?}', "", path.read_text(encoding="utf-8"), flags=re.S)
        found = {line for line in source.splitlines() if methods.search(line)}
        allowed = {line for line in found if "try: pip install" in line}
        assert found == allowed, (path, found - allowed)


def test_a_variant_imports_no_other() -> None:
    """Each module is read alone; what several need to read PEFT's folders is in modules that begin with `_`."""
    for package in (ROOT / "plugins").glob("*/lora_lite_*"):
        modules = {path.stem: path for path in package.glob("[a-z]*.py")}
        for name, path in modules.items():
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom):
                    named = {node.module or "", *(alias.name for alias in node.names)}
                    assert node.level == 0 or not named & modules.keys(), f"{package.name}.{name} imports {named}"
                    assert node.level or (node.module or "").partition(".")[0] != package.name, f"{package.name}.{name}"


def test_variants_use_what_anybody_may_use() -> None:
    for path in (ROOT / "plugins").glob("*/lora_lite_*/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("lora_lite_core."), f"{path.name} imports {node.module}"


# --- the lock file -----------------------------------------------------------------------------------------------


def committed_lock() -> str:
    done = subprocess.run(["git", "show", "HEAD:uv.lock"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return done.stdout


def test_the_committed_lock_names_no_index() -> None:
    assert "://" not in committed_lock()


def test_the_committed_lock_pins_what_is_installed() -> None:
    pinned: dict[str, set[str]] = {}
    for package in tomllib.loads(committed_lock())["package"]:
        pinned.setdefault(package["name"], set()).add(package["version"])
    places = [place for place in sys.path if not place.endswith("_vendor")]  # setuptools shows its own copies there
    installed = {re.sub(r"[-_.]+", "-", d.name).lower(): d.version for d in distributions(path=places) if d.name}
    known = {name: version for name, version in installed.items() if name in pinned}
    assert len(known) > 30
    wrong = {
        name: (version, pinned[name]) for name, version in known.items() if version.split("+")[0] not in pinned[name]
    }
    assert not wrong


COMPLETE = """version = 1
revision = 3
requires-python = ">=3.10"

[manifest]
members = [
    "lora-lite-core",
]

[[package]]
name = "click"
version = "8.1"
source = { registry = "https://index.example/simple" }
resolution-markers = [
    "python_full_version < '3.11'",
]
dependencies = [
    { name = "colorama", marker = "sys_platform == 'win32'" },
]
sdist = { url = "https://files.example/click.tar.gz", hash = "sha256:00" }
wheels = [
    { url = "https://files.example/click.whl", hash = "sha256:00" },
]

[[package]]
name = "lora-lite-core"
version = "0.1.0"
source = { editable = "." }
dependencies = [
    { name = "click" },
]

[package.metadata]
requires-dist = [{ name = "click", specifier = ">=8.1" }]
"""

REDUCED = """version = 1
revision = 3
requires-python = ">=3.10"

[manifest]
members = [
    "lora-lite-core",
]

[[package]]
name = "click"
version = "8.1"
source = { registry = "." }
resolution-markers = [
    "python_full_version < '3.11'",
]

[[package]]
name = "lora-lite-core"
version = "0.1.0"
source = { editable = "." }
"""


def test_reducing_a_lock() -> None:
    assert reduce(COMPLETE) == REDUCED
    assert reduce(REDUCED) == REDUCED, "the git filter may run twice"


def test_just_setup_hides_the_completed_lock(tmp_path: Path) -> None:
    recipe = re.search(r"^setup:\n((?: +.+\n)+)", (ROOT / "justfile").read_text(encoding="utf-8"), flags=re.M)
    assert recipe
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    shutil.copy(ROOT / ".gitattributes", tmp_path)

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    (tmp_path / "uv.lock").write_text(REDUCED, encoding="utf-8")
    git("init", "--quiet")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b.invalid", "commit", "--quiet", "-m", "all")
    for line in recipe[1].splitlines():
        if line.strip().startswith("uv lock"):
            (tmp_path / "uv.lock").write_text(COMPLETE, encoding="utf-8")
            assert git("status", "--short") == " M uv.lock\n"
        else:
            subprocess.run(line, shell=True, cwd=tmp_path, check=True)
    assert git("status", "--short") == ""
    assert (tmp_path / "uv.lock").read_text(encoding="utf-8") == COMPLETE


def test_checking_a_lock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").write_text(COMPLETE, encoding="utf-8")
    (tmp_path / "b").write_text(REDUCED, encoding="utf-8")
    assert reduce_lock_main(["--check", str(tmp_path / "b")]) == 0
    assert reduce_lock_main(["--check", str(tmp_path / "a")]) == 1
    assert "names a package index; type: just lock" in capsys.readouterr().err
