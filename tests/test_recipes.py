"""docs/recipes.md shows the scripts of examples/, and they run. Those of packages that are not here: tools/recipes."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from textwrap import indent

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
RECIPES = sorted((ROOT / "examples/recipes").glob("*.py"))
NAMES = [path.stem for path in RECIPES]
COMMAND = r"^(?:python|accelerate launch|torchrun .*?) (examples/\S+\.py)"


def sections() -> dict[str, list[str]]:
    """The Python blocks below each command that runs a script, by the script's path."""
    found = {}
    for section in re.split(r"^## ", PAGE, flags=re.M):
        if command := re.search(COMMAND, section, flags=re.M):
            found[command[1]] = re.findall(r"^```python\n(.*?)^```$", section, flags=re.M | re.S)
    return found


def needed(path: Path) -> set[str]:
    """The packages that a script imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).partition(".")[0])
    return names


def run(folder: Path, *command: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def test_the_page_has_every_recipe() -> None:
    assert sorted(sections()) == sorted(
        ["examples/distributed_finetune.py", *(f"examples/recipes/{name}.py" for name in NAMES)]
    )
    assert len(re.findall(r"^pip install ", PAGE, flags=re.M)) == len(sections())
    assert not re.search(r"^```python\n", PAGE.partition("\n## ")[0], flags=re.M)


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_the_page_shows_a_script_as_it_is(path: Path) -> None:
    _, _, code = path.read_text(encoding="utf-8").partition('See docs/recipes.md."""\n\n')
    assert sections()[f"examples/recipes/{path.name}"] == [code]


def test_the_page_shows_a_part_of_the_script_for_several_processes() -> None:
    script = (ROOT / "examples/distributed_finetune.py").read_text(encoding="utf-8")
    shown = sections()["examples/distributed_finetune.py"]
    assert shown
    assert all(any(indent(block, " " * depth) in script for depth in (0, 4, 8)) for block in shown)


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_a_recipe_runs(path: Path, tmp_path: Path) -> None:
    """It compares what it has trained with what it has saved and loaded itself."""
    if missing := sorted(name for name in needed(path) if not importlib.util.find_spec(name)):
        pytest.skip(f"{', '.join(missing)} is not installed here; type: tools/recipes {path.stem}")
    shown = run(tmp_path, path)
    assert re.search(r"^<Adapter 'default': \w+, .*trainable parameters", shown, flags=re.M)


@pytest.mark.slow
def test_the_loop_on_two_processes_goes_on(tmp_path: Path) -> None:
    script = ROOT / "examples/recipes/accelerate_loop.py"
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2, "--num_machines", 1, script)
    first = run(tmp_path, *launch, "--variant", "dora")
    more = run(tmp_path, *launch, "--variant", "dora", "--resume", "accelerate-run/state")
    losses = [float(loss) for loss in re.findall(r"^epoch \d: loss (\S+)$", first + more, flags=re.M)]
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True)
