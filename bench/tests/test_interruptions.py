"""Runs that are killed and go on, and runs of several processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lora_lite_bench.comparing.results import ResultsFile, read
from lora_lite_bench.comparing.workers import workers
from lora_lite_bench.machine.stopping import Stopped
from lora_lite_bench.runs.methods import FULL
from lora_lite_bench.runs.run import Job, Result, run
from lora_lite_bench.tasks import Batch

pytestmark = pytest.mark.usefixtures("own_cache")
SMALL = {"dtype": "float32", "batch_size": 4, "new_tokens": 4, "length": 96, "valid_count": 4, "test_count": 4}

SMALL |= {"save_every": 3, "trained_on": "all"}


class Killed(Exception):
    """Instead of a signal."""


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("lora", {"r": 4, "dropout": 0.2}),
        ("dora", {"r": 4}),
        ("antipasto", {"r": 8, "target_names": ("mlp",)}),
        ("adalora", {"r": 4, "target_r": 1, "total_step": 8, "tinit": 1, "tfinal": 1, "interval": 1}),
        (FULL, {}),
    ],
)
def test_a_killed_run_goes_on_where_it_was(
    method: str, fields: dict[str, Any], places: dict[str, str], tmp_path: Path
) -> None:
    """Losses, scores and file are those of a run that nobody disturbed; what was done is not done again."""
    job = Job("gsm8k", {**places, **SMALL}, method, fields, 0, 1e-2, 8)
    expected = run(job)
    seen: list[int] = []

    def until_six() -> None:
        seen.append(len(seen))
        if len(seen) == 7:
            raise Killed

    with pytest.raises(Killed):
        run(job, tmp_path / "state", until_six)
    assert [folder.name for folder in (tmp_path / "state").iterdir()] == ["step-6"]
    shutil.copytree(tmp_path / "state" / "step-6", tmp_path / "state" / "part")  # killed while it wrote the next
    taken: list[Batch] = []
    result = run(job, tmp_path / "state", lambda: taken.append({}))
    assert len(taken) == 8
    times = {"init_s": 0.0, "train_s": 0.0}
    assert replace(result, **times) == replace(expected, **times)
    assert [folder.name for folder in (tmp_path / "state").iterdir()] == ["step-8"]
    whole = run(job, tmp_path / "state")
    assert whole.losses == expected.losses, "killed while it was scored"


def test_ctrl_c_ends_a_run_at_its_next_step(places: dict[str, str], tmp_path: Path) -> None:
    job, begun = Job("gsm8k", {**places, **SMALL}, "lora", {"r": 4}, 0, 1e-2, 10**6), threading.Event()
    futures = []

    def interrupted() -> None:
        with workers(1, begun.set) as submit:
            futures.append(submit(job, tmp_path / "state"))
            assert begun.wait(60)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert isinstance(futures[0].exception(), Stopped)
    assert run(replace(job, steps=1)).losses, "others may begin"


def test_a_state_is_removed_when_the_line_is_there(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path / "r.jsonl")
    jobs = [Job("shifted", {}, "lora", {}, seed, 1e-3, 8) for seed in (0, 1)]
    for job in jobs:
        file.unfinished(job).mkdir(parents=True)
    file.append(jobs[0], Result())
    assert not file.unfinished(jobs[0]).exists()
    assert file.unfinished(jobs[1]).exists()
    file.append(jobs[1], Result())
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]


def test_of_several_processes_one_writes(tmp_path: Path) -> None:
    other = ResultsFile(tmp_path / "r.jsonl", writes=False)
    record = other.append(Job("shifted", {}, "lora", {}, 0, 1e-3, 8), Result())
    assert other.records == {record.key: record}
    assert not (tmp_path / "r.jsonl").exists()
    (tmp_path / "r.jsonl").write_text('{"kind": "ru', encoding="utf-8")
    ResultsFile(tmp_path / "r.jsonl", writes=False)
    assert (tmp_path / "r.jsonl").read_text(encoding="utf-8") == '{"kind": "ru'


def command(places: dict[str, str], out: Path, steps: int, *more: str) -> list[str]:
    knobs = [part for name, value in SMALL.items() for part in ("--knob", f"{name}={value}")]
    where = ["--model", places["model"], "--data", places["data"], "--out", str(out)]
    script = str(Path(sys.executable).with_name("lora-lite"))
    return [
        script,
        "bench",
        "lora",
        "--task",
        "gsm8k",
        "--no-anchors",
        "--lr",
        "0.01",
        "--steps",
        str(steps),
        *where,
        *knobs,
        *more,
    ]


@pytest.mark.slow
def test_a_killed_command_goes_on(places: dict[str, str], tmp_path: Path) -> None:
    """The second command ends with the losses of a run that nobody disturbed, and one line."""
    out, steps = tmp_path / "r.jsonl", 60
    with subprocess.Popen(command(places, out, steps), stderr=subprocess.PIPE, text=True) as started:
        deadline = time.monotonic() + 300
        while not any(tmp_path.glob("r.jsonl.unfinished/*/step-*")):
            assert started.poll() is None, started.stderr and started.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        started.send_signal(signal.SIGKILL)
    assert not out.exists()
    (kept,) = tmp_path.glob("r.jsonl.unfinished/*/step-*")
    assert int(kept.name.partition("-")[2]) < steps
    subprocess.run(command(places, out, steps), check=True, capture_output=True)
    (line,) = [record for record in read([out]) if record.kind == "run"]
    expected = run(line.job)
    assert line.outcome.losses == pytest.approx(expected.losses, abs=1e-4)  # type: ignore[union-attr]
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.slow
def test_two_processes_compute_what_one_does(places: dict[str, str], tmp_path: Path) -> None:
    """By torchrun, each with a share of every batch, an example at once; one of them writes."""
    out = tmp_path / "r.jsonl"
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2", "--no-python"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*torchrun, *command(places, out, 8, "--knob", "at_once=1")], check=True, capture_output=True, env=environment
    )
    assert [record.kind for record in read([out])] == ["run", "costs"]
    two: Any = read([out])[0]
    one = run(two.job)
    assert two.outcome.losses == pytest.approx(one.losses, abs=1e-4)
    assert two.outcome.valid_loss == pytest.approx(one.valid_loss, abs=1e-4)
    assert (two.outcome.test, two.outcome.valid) == (one.test, one.valid)
    assert two.outcome.at_once == 1


def _lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="how a process is seen to have ended")
def test_workers_end_when_the_command_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "import multiprocessing\n"
        "from lora_lite_bench.comparing import workers\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), workers._start)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    time.sleep(600)\n",
        encoding="utf-8",
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            worker = int(parent.stdout.readline())
            assert _lives(worker)
        finally:
            parent.kill()
    until = time.monotonic() + 60
    while _lives(worker) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _lives(worker)
