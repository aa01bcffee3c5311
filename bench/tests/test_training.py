"""Training by a recipe: batches in parts, states to go on from, memory that ends, several processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_lite_bench.methods import FULL
from lora_lite_bench.results import ResultsFile, read
from lora_lite_bench.run import Job, Result, run
from lora_lite_bench.scoring import score, valid_loss
from lora_lite_bench.stopping import Stopped
from lora_lite_bench.tasks import Batch, Recipe, Task, rows
from lora_lite_bench.tasks.gsm8k import Gsm8k
from lora_lite_bench.training import Training, parts
from lora_lite_bench.workers import workers
from torch import Tensor, nn

from bench.tests.word_problems import write_data, write_model

SMALL = {"dtype": "float32", "batch_size": 4, "new_tokens": 4, "length": 96, "valid_count": 4, "test_count": 4}
SMALL |= {"save_every": 3, "trained_on": "all"}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("training")
    return {"model": str(write_model(folder / "model")), "data": str(write_data(folder / "data"))}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@dataclass(frozen=True, kw_only=True)
class Lines(Task):
    """Straight lines through points: the mean square error of a linear layer. `most` examples fit into memory."""

    batch_size: int = 6
    most: int = 10**9
    decay: float = 0.0
    clip: float = 0.0
    schedule: Any = "cosine"

    def load(self) -> tuple[nn.Module, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).eval(), None

    def batches(self, processor: Any, split: Any, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while split != "own":
            x = torch.randn(self.batch_size, 3, generator=generator)
            yield {"x": x, "y": x.sum(1, keepdim=True)}
            if split != "train":
                return

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if rows(batch) > self.most:
            torch.empty(2**55)  # more than any machine has: the allocator says so
        return nn.functional.mse_loss(model(batch["x"]), batch["y"])

    def correct(self, model: Any, processor: Any, batch: Batch) -> Tensor:
        self.loss(model, batch)
        return (batch["x"][:, 0] > 0).float()

    def recipe(self) -> Recipe:
        return Recipe(weight_decay=self.decay, clip=self.clip, schedule=self.schedule)


def trained(task: Lines, steps: int = 5, lr: float = 0.05) -> tuple[Training, list[Tensor]]:
    model, _ = task.load()
    training = Training(task, model, list(model.parameters()), adapted=False, lr=lr, steps=steps)
    training.carry_out(None, 0, lambda: None)
    return training, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(("most", "found"), [(4, 3), (2, 1), (1, 1)])
def test_memory_that_ends_halves_what_goes_through_at_once(most: int, found: int) -> None:
    whole, expected = trained(Lines())
    halved, got = trained(Lines(most=most))
    assert (whole.at_once.size, halved.at_once.size) == (6, found)
    assert halved.losses == pytest.approx(whole.losses, abs=2e-5)
    torch.testing.assert_close(got, expected)
    task = Lines(most=most)
    model, _ = task.load()
    assert score(task, model, None, "test") == score(Lines(), model, None, "test")
    assert valid_loss(task, model, None) == pytest.approx(valid_loss(Lines(), model, None))


def test_one_example_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        trained(Lines(most=0))


def test_parts_are_of_all_examples() -> None:
    task = Lines()
    batch = next(task.batches(None, "valid", 0))
    for size in (1, 4, 6, 9):
        made = parts(task, batch, size)
        assert max(map(rows, made)) <= size
        assert torch.equal(torch.cat([part["x"] for part in made]), batch["x"])


def test_recipe() -> None:
    """AdamW by hand: decay of matrices, not of biases; clipping; the schedule's first rates."""
    task = Lines(decay=0.5, clip=1e-3, schedule="constant")
    model, _ = task.load()
    _, got = trained(task, steps=1)
    batch = next(task.batches(None, "train", 0))
    task.loss(model, batch).backward()
    for before, after in zip(model.parameters(), got, strict=True):
        decayed = before * (1 - 0.05 * 0.5) if before.dim() > 1 else before
        assert before.grad is not None
        torch.testing.assert_close(after, decayed - 0.05 * before.grad.sign(), atol=1e-3, rtol=0)
    norms = []
    model, _ = task.load()
    training = Training(task, model, list(model.parameters()), adapted=False, lr=0.05, steps=2)
    training.optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.stack([p.grad.norm() for p in training.parameters]).norm().item())
    )
    training.carry_out(None, 0, lambda: None)
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-3)
    cosine = Training(Lines(), model, list(model.parameters()), adapted=False, lr=0.05, steps=20)
    assert cosine.scheduler.get_last_lr() == [0.0, 0.0], "a warm-up over a tenth of the steps"


class Killed(Exception):
    """Instead of a signal."""


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("lora", {"r": 4, "dropout": 0.2}),
        ("dora", {"r": 4}),
        ("antipasto", {"r": 8, "target_names": ("mlp",)}),
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
    (tmp_path / "r.jsonl").write_text("half", encoding="utf-8")
    ResultsFile(tmp_path / "r.jsonl", writes=False)
    assert (tmp_path / "r.jsonl").read_text(encoding="utf-8") == "half"


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


def test_gsm8k_keeps_states_and_takes_the_whole_machine() -> None:
    assert Gsm8k().recipe() == Recipe(weight_decay=0.1, clip=1.0, save_every=100)
    assert Gsm8k.ALONE
