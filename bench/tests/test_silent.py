"""What went by without a word: runs that were stopped, problems that are none, seeds that are none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from lora_lite_bench.command import bench
from lora_lite_bench.comparing.caption import caption
from lora_lite_bench.comparing.results import Record
from lora_lite_bench.comparing.table import tables
from lora_lite_bench.runs.run import Job, Result
from lora_lite_bench.tasks import TaskError, make_task

JOB = Job("shifted", {}, "lora", {}, seed=0, lr=10.0, steps=48, label="lora")


def test_runs_that_were_stopped_are_told() -> None:
    """They stood in the table as 0 %."""
    fine, stopped = Result(test=0.5, valid=0.5, valid_loss=1.0, trainable=3), Result(stopped="loss 1 had become 4")
    records = [Record(replace(JOB, seed=n), stopped if n < 2 else fine, key=str(n)) for n in range(3)]
    records += [Record(replace(JOB, method="ia3", label="ia3", seed=n), fine, key=f"ia3 {n}") for n in range(3)]
    (table,) = tables(records)
    assert "Training fell apart, and counts as 0 %: lora in 2 of 3 seeds." in caption(table)
    assert "fell apart" not in caption(tables(records[3:])[0])


@pytest.mark.parametrize("task", ["shifted", "facts", "order", "gsm8k"])
@pytest.mark.parametrize("knob", ["test_count", "valid_count"])
@pytest.mark.parametrize("count", [0, -1])
def test_scores_of_no_problems(task: str, knob: str, count: int) -> None:
    """0 was shown as a score of 0 %, -1 left the last problem out."""
    with pytest.raises(TaskError, match=f"--knob {knob}={count}: at least 1"):
        make_task(task, {knob: count})


@pytest.mark.parametrize("seed", ["-1", str(2**70), "1.5"])
def test_seeds_that_are_none_are_refused_before_anything_is_run(seed: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(bench, ["ia3", "--seed", seed, "--out", str(tmp_path / "r.jsonl")])
    assert done.exit_code == 2
    assert "Invalid value for '--seed'" in done.output
