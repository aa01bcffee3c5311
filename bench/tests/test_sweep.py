"""Which runs are made, what is chosen, and what can be said of a difference."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from lora_lite_bench.comparing.noise import interval, paired, verdict
from lora_lite_bench.comparing.results import Record, ResultsError, ResultsFile, read
from lora_lite_bench.comparing.sweep import GRID, Settings, chosen, plan
from lora_lite_bench.comparing.table import cells, tables
from lora_lite_bench.runs.methods import FROZEN
from lora_lite_bench.runs.run import Job, Result

JOB = Job("shifted", {}, "ia3", {}, seed=0, lr=0.0, steps=100)
SETTINGS = Settings(rates=(1e-3, 3.2e-3, 1e-2), seeds=(5, 6, 7), finalists=1)


def played(
    settings: Settings,
    loss: Callable[[Job], float],
    stated: float | None = None,
    job: Job = JOB,
    valid: Callable[[Job], float] = lambda job: 0.5,
) -> list[list[Job]]:
    """The rounds of a plan whose runs end with these losses."""
    rounds: list[list[Job]] = []
    plan_ = plan(job, settings, stated)
    try:
        rounds.append(next(plan_))
        while True:
            rounds.append(plan_.send([Result(valid_loss=loss(job), valid=valid(job)) for job in rounds[-1]]))
    except StopIteration:
        return rounds


def test_halving() -> None:
    quarter, half, whole = played(SETTINGS, lambda job: abs(math.log(job.lr / 3e-3)))
    assert [(job.lr, job.steps, job.seed, job.whole) for job in quarter] == [
        (lr, 25, 5, False) for lr in SETTINGS.rates
    ]
    assert [(job.lr, job.steps) for job in half] == [(3.2e-3, 50), (1e-3, 50)], "the best half; below the best"
    assert [(job.lr, job.steps, job.seed, job.whole) for job in whole] == [(3.2e-3, 100, s, True) for s in (5, 6, 7)]


def test_longer_runs_go_on_to_lower_rates() -> None:
    rounds = played(SETTINGS, lambda job: abs(math.log(job.lr / (3e-3 if job.steps == 25 else 3e-4))))
    assert [[job.lr for job in round_] for round_ in rounds[1:-1]] == [[3.2e-3, 1e-3], [3.2e-4], [1e-4]]
    assert {job.lr for job in rounds[-1]} == {3.2e-4}


def test_the_grid_goes_on_past_its_edge() -> None:
    first, second, third, *_, last = played(SETTINGS, lambda job: abs(math.log(job.lr / 3e-2)))
    assert ([job.lr for job in second], [job.lr for job in third]) == ([3.2e-2], [1e-1])
    assert {job.lr for job in last} == {3.2e-2}
    down = played(SETTINGS, lambda job: job.lr)
    tried = [job.lr for round_ in down for job in round_ if job.steps == 25]
    assert tried == [*SETTINGS.rates, 3.2e-4, 1e-4, 3.2e-5, 1e-5], "no further than `beyond`"
    assert first[0].lr == 1e-3


def test_a_grid_that_is_not_continued() -> None:
    rounds = played(Settings(rates=(1e-3, 1e-2), seeds=(0,), beyond=0, finalists=1), lambda job: job.lr)
    assert [[job.lr for job in round_] for round_ in rounds] == [[1e-3, 1e-2], [1e-3, 1e-2], [1e-3]]


@pytest.mark.parametrize("behind", [0.25, 0.35])
def test_finalists_meet_on_all_seeds_unless_one_is_out_of_reach(behind: float) -> None:
    """The rate with the lower loss in short runs is behind on the first seeds, and best on the others."""

    def valid(job: Job) -> float:
        return 0.5 + (1 if job.seed < 7 else -1) * (behind if job.lr == 1e-3 else 0.0)

    settings = Settings(rates=SETTINGS.rates, seeds=(5, 6, 7, 8, 9))
    first, others, last = played(settings, lambda job: abs(math.log(job.lr / 2.9e-3)), valid=valid)[-3:]
    assert [(job.lr, job.seed) for job in first] == [(3.2e-3, 5), (3.2e-3, 6), (1e-3, 5), (1e-3, 6)]
    met = [3.2e-3, 1e-3] if behind < 0.3 else [1e-3]
    assert [(job.lr, job.seed) for job in others] == [(lr, seed) for lr in met for seed in (7, 8, 9)]
    assert [(job.lr, job.seed, job.whole) for job in last] == [(met[0], s, True) for s in settings.seeds]


def test_validation_chooses_whatever_the_test_says() -> None:
    assert chosen({1e-3: [Result(valid=0.9, test=0.1)], 1e-2: [Result(valid=0.8, test=0.9)]}) == 1e-3


def test_a_stated_rate_is_not_swept_and_the_frozen_base_is_scored_once() -> None:
    assert [[(job.lr, job.seed) for job in r] for r in played(SETTINGS, lambda job: 0, 0.7)] == [
        [(0.7, s) for s in (5, 6, 7)]
    ]
    ((job,),) = played(SETTINGS, lambda job: 0, job=Job("shifted", {}, FROZEN, {}, 0, 0.0, 100))
    assert (job.steps, job.whole) == (0, True)


def test_the_grid_has_two_points_a_decade() -> None:
    assert GRID == (1e-4, 3.2e-4, 1e-3, 3.2e-3, 1e-2, 3.2e-2, 1e-1, 3.2e-1)


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    rng = random.Random(0)
    held = 0
    for _ in range(2000):
        found = interval([rng.gauss(3, 2) for _ in range(5)])
        held += found.low <= 3 <= found.high
    assert abs(held / 2000 - 0.95) < 0.015


def test_pairing_takes_out_what_seeds_share() -> None:
    shared = {0: 0.2, 1: 0.5, 2: 0.8, 3: 0.4, 4: 0.6}
    ours = {seed: value + 0.02 + 0.001 * seed for seed, value in shared.items()} | {9: 0.0}
    found = paired(ours, shared)
    assert found is not None
    assert found.count == 5
    assert verdict(found, "lora") == "better than lora by 2.2 (+2.0 to +2.4)"
    assert verdict(paired(shared, ours), "lora") == "worse than lora by 2.2 (-2.4 to -2.0)"
    mixed = paired(dict(zip(shared, (0.3, 0.4, 0.9, 0.3, 0.6), strict=True)), shared)
    assert verdict(mixed, "lora").startswith("not distinguishable from lora (-")
    assert verdict(paired({0: 1.0}, {1: 1.0}), "lora") == "no seed in common with lora"
    assert verdict(paired({0: 1.0}, {0: 1.0}), "lora") == "one seed: cannot be compared with lora"


def made(method: str, tests: list[float], **changes: float) -> list[Record]:
    """Whole runs of a method at two rates, of which validation prefers the second."""
    records = []
    for lr, valid, shift in ((0.1, 0.4, 0.3), (0.01, 0.6, 0.0)):
        for seed, test in enumerate(tests):
            job = Job("shifted", {}, method, {}, seed, lr, 48)
            fields = {"test": min(1.0, test + shift), "own": 0.25, "trainable": 100, "rank": 4, **changes}
            records.append(Record(job, Result(valid=valid, valid_loss=1.0, **fields), key=f"{method} {lr} {seed}"))  # type: ignore[arg-type]
    return records


def test_a_table() -> None:
    frozen = Record(Job("shifted", {}, FROZEN, {}, 0, 0.0, 0), Result(test=0.0, valid=0.0, own=1.0), key="f")
    records = [
        *made("lora", [0.5, 0.6, 0.55]),
        *made("ia3", [0.1, 0.2, 0.16], trainable=20),
        *made("dora", [0.5, 0.61, 0.56]),
        frozen,
    ]
    (table,) = tables(records)
    assert cells(table.rows[0])[3:5] == ("–", "–"), "no rank was matched"
    few = made("lora_xs", [0.2, 0.3, 0.25], trainable=20)
    matched = [replace(r, job=replace(r.job, column="matched"), key=f"{r.key} matched") for r in few]
    (table,) = tables([*records, *few, *matched])
    assert [row.method for row in table.rows] == ["dora", "lora", "lora_xs", "ia3", FROZEN], "by score, anchors last"
    row = table.row("ia3")
    assert row is not None
    assert row.main.lr == 0.01, "chosen on validation, not by the higher test score"
    assert row.forgets == pytest.approx(0.75)
    shown = dict(zip(("variant", "r", "test", "matched r", "matched test"), cells(row), strict=False))
    assert shown == {"variant": "ia3", "r": "4", "test": "15.3 ± 12.5", "matched r": "–", "matched test": "–"}
    assert "worse than lora by 39.7" in row.verdict()
    assert cells(table.rows[0])[3:5] == ("4", "55.7 ± 13.7"), "as many parameters as lora has"
    assert table.rows[0].verdict().startswith("not distinguishable from lora")


def test_files_are_merged_and_what_is_no_result_is_said(tmp_path: Path) -> None:
    one, two = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    ResultsFile(one).append(JOB, Result(valid=0.1))
    file = ResultsFile(two)
    file.append(JOB, Result(valid=0.2))
    file.append(Job("shifted", {}, "lora", {}, seed=0, lr=0.0, steps=100), Result(valid=0.3))
    assert sorted(record.outcome.valid for record in read([one, two])) == [0.2, 0.3]  # type: ignore[union-attr]
    (tmp_path / "no").write_text('{"variant": "lora"}\n', encoding="utf-8")
    with pytest.raises(
        ResultsError, match="no, line 1 is no result of `lora-lite bench` of this version: KeyError: 'kind'"
    ):
        read([tmp_path / "no"])
