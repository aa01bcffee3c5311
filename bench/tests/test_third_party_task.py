"""The task in the README, as somebody else's package, and a variant in a file: both appear without a change here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from lora_lite_bench.command import bench
from lora_lite_bench.comparing.results import read
from lora_lite_bench.tasks import TaskError, make_task, task_names

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
CODE, ENTRY = (re.search(rf"^```{kind}\n(.*?)^```", README, flags=re.M | re.S)[1] for kind in ("python", "toml"))  # type: ignore[index]
VARIANT = '''
"""Gain: y (1 + g)."""
from dataclasses import dataclass
from lora_lite_core import AdapterConfig, ParamSpec, hookimpl

BENCH = {"lr": 0.01}

@dataclass(frozen=True, kw_only=True)
class GainConfig(AdapterConfig):
    variant = "gain"

Config = GainConfig

@hookimpl
def param_specs(d_out):
    return {"lora_g": ParamSpec((d_out,))}

@hookimpl
def forward(y, params):
    return y * (1 + params["lora_g"].to(y.dtype))
'''


@pytest.fixture
def parity(site: Path) -> Path:
    install(site, CODE, ENTRY.splitlines()[1].replace('"', ""))
    return site


def install(site: Path, code: str, entry: str, name: str = "lora_lite_parity") -> None:
    (site / f"{name}.py").write_text(code, encoding="utf-8")
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[lora_lite.tasks]\n{entry}\n", encoding="utf-8")


def test_it_has_at_most_40_lines_of_code() -> None:
    assert len([line for line in CODE.splitlines() if line.strip()]) <= 40


@pytest.mark.parametrize("jobs", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_task_and_a_variant_of_others(parity: Path, jobs: str) -> None:
    assert "parity" in task_names()
    file = parity / "gain.py"
    file.write_text(VARIANT, encoding="utf-8")
    out = parity / "r.jsonl"
    arguments = [
        str(file),
        "lora",
        "--task",
        "parity",
        "--quick",
        "--jobs",
        jobs,
        "--knob",
        "bits=4",
        "--out",
        str(out),
    ]
    try:
        done = CliRunner().invoke(bench, arguments)
    finally:
        __import__("lora_lite").unregister("gain")
    assert done.exit_code == 0, done.output
    assert "parity (bits=4), 16 steps" in done.output
    records = read([out])
    methods = {record.job.method for record in records}
    assert methods == {"gain", "lora", "(frozen)", "(full fine-tuning)", "(head only)"}
    assert {record.job.lr for record in records if record.job.method == "gain" and record.kind == "run"} == {0.01}
    assert "gain" in (parity / "r.html").read_text(encoding="utf-8")
    assert "forgets" not in done.output, "an own task that is not known"


def test_what_is_wrong_with_a_task_is_said(site: Path) -> None:
    install(site, "class Thing: ...", "thing = lora_lite_thing:Thing", "lora_lite_thing")
    with pytest.raises(TaskError, match="name a subclass of lora_lite_bench.tasks.Task"):
        make_task("thing", {})
    code = "from lora_lite_bench.tasks import Task\nclass Half(Task): ..."
    install(site, code, "half = lora_lite_half:Half", "lora_lite_half")
    with pytest.raises(TaskError, match="task 'half' of lora_lite_half has no batches, correct, load, loss"):
        make_task("half", {})
    install(site, "1 / 0", "gone = lora_lite_gone:X", "lora_lite_gone")
    with pytest.raises(TaskError, match="cannot be imported: ZeroDivisionError: division by zero"):
        make_task("gone", {})
    install(site, "", "shifted = lora_lite_rival:X", "lora_lite_rival")
    with pytest.raises(TaskError, match="claimed twice|claimed by"):
        make_task("shifted", {})


def test_knobs_that_a_task_refuses() -> None:
    with pytest.raises(TaskError, match="facts=1: from 2 to 512 can be told apart"):
        make_task("facts", {"facts": 1})


def test_of_several_tasks_one_that_cannot_be_made_ready_does_not_end_the_others(
    parity: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setattr("lora_lite_bench.report.page.pictures", lambda table: iter(()))
    digits = __import__("lora_lite_bench.tasks.digits", fromlist=["_images"])
    digits._images.cache_clear()
    out = ["--out", str(parity / "r.jsonl")]
    both = ["--task", "digits", "--task", "parity", "--quick", "--jobs", "1", "--lr", "0.01", "--no-anchors", *out]
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "sklearn.datasets", None)
        alone = CliRunner().invoke(bench, ["ia3", "--task", "digits", "--quick", "--jobs", "1", *out])
        done = CliRunner().invoke(bench, ["ia3", *both])
    needs = "task 'digits' needs scikit-learn; type: pip install 'lora-lite-bench[digits]'"
    assert alone.exit_code == 1
    assert needs in alone.output
    assert done.exit_code == 1
    assert f"task digits failed: {needs}" in done.output
    assert {record.job.task for record in read([parity / "r.jsonl"])} == {"parity"}
