"""What stands in one table and what does not, and what is said of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from lora_lite_bench.comparing.caption import caption, costs_caption
from lora_lite_bench.comparing.results import Record
from lora_lite_bench.comparing.table import TaskTable, cells, tables
from lora_lite_bench.report.command import report
from lora_lite_bench.report.page import environments
from lora_lite_bench.runs.costing import Costs
from lora_lite_bench.runs.methods import FROZEN
from lora_lite_bench.runs.run import Job, Result

FIRST = Job("parity", {}, "lora", {}, seed=0, lr=0.01, steps=48)
DAY = "2026-01-0{}T00:00:00+0000"


def line(job: Job, test: float, code: tuple[str, str] = ("", ""), day: int = 1) -> Record:
    result = Result(test=test, valid=test, valid_loss=1 - test, trainable=100, examples={"test": 300, "valid": 100})
    return Record(job, result, {"torch": "2"}, DAY.format(day), f"{job} {code}", code)


def runs(method: str, test: float, seeds: int = 3, code: tuple[str, str] = ("", ""), day: int = 1, **job: object):  # type: ignore[no-untyped-def]
    first = replace(FIRST, method=method, **job)  # type: ignore[arg-type]
    return [line(replace(first, seed=seed), test + seed / 100, code, day) for seed in range(seeds)]


def said(table: TaskTable) -> dict[str, str]:
    return {row.label: row.verdict() for row in table.rows}


def test_runs_of_other_lengths_are_another_table() -> None:
    """A task whose sizes differ in their steps alone: quick, short and full runs have the same knobs."""
    short = [replace(FIRST, steps=steps, lr=0.1, whole=False) for steps in (4, 12, 24)]
    records = [*runs("lora", 0.9), *runs("lora", 0.1, steps=16), *(line(job, 0.2) for job in short)]
    records.append(line(replace(FIRST, method=FROZEN, steps=0), 0.0))
    long, quick = tables(records)
    assert [(table.steps, table.rows[0].main.test.mean) for table in (long, quick)] == [(48, 0.91), (16, 0.11)]
    assert sorted(long.rows[0].curve) == [(0.01, 48), (0.1, 12), (0.1, 24)]
    assert sorted(quick.rows[0].curve) == [(0.01, 16), (0.1, 4)]
    assert all(table.row(FROZEN) for table in (long, quick))


def test_steps_of_a_module_are_told() -> None:
    records = [*runs("lora", 0.5), *runs("mine", 0.9, steps=200, own_steps=True)]
    (table,) = tables(records)
    assert table.steps == 48
    assert said(table)["mine"].startswith("better than lora")
    assert "Trained for steps of its own, as its module states (BENCH): mine 200." in caption(table)
    assert "(BENCH): mine" not in caption(tables(runs("lora", 0.5))[0])


def test_a_method_that_was_configured_twice_has_two_rows() -> None:
    """As two experiments of PEFT's method comparison do, in one results file."""
    fields = {"target_names": ["q_proj"], "r": 32}
    records = [*runs("lora", 0.5, fields=fields), *runs("lora", 0.7, fields={**fields, "r": 64}), *runs("ia3", 0.2)]
    (table,) = tables(records)
    assert {row.label: row.main.test.mean for row in table.rows} == pytest.approx(
        {"lora r=64": 0.71, "lora r=32": 0.51, "ia3": 0.21}
    )
    matched = runs("dora", 0.4, fields={"r": 4}) + runs("dora", 0.6, fields={"r": 7}, column="matched")
    (table,) = tables([*runs("lora", 0.5), *matched])
    row = table.row("dora")
    assert row is not None
    assert (row.label, row.scores["matched"].test.mean) == ("dora", pytest.approx(0.61))


def test_set_fields_do_not_take_the_reference_away() -> None:
    fields = {"r": 2}
    records = [r for m, t in (("lora", 0.5), ("dora", 0.7)) for r in runs(m, t, fields=fields, label=f"{m} r=2")]
    (table,) = tables(records)
    assert said(table) == {"lora r=2": "the reference", "dora r=2": "better than lora r=2 by 20.0 (+20.0 to +20.0)"}
    (table,) = tables([*records, *runs("lora", 0.6, label="lora")])
    assert said(table) == {
        "lora": "the reference",
        "lora r=2": "worse than lora by 10.0 (-10.0 to -10.0)",
        "dora r=2": "better than lora r=2 by 20.0 (+20.0 to +20.0)",
    }


def test_results_of_older_code_do_not_mix_with_the_newest() -> None:
    """A method in a file, changed and run again: its sweep may have chosen another rate than before."""
    old = runs("mine", 0.9, code=("t", "a"), lr=0.1)
    new = runs("mine", 0.3, code=("t", "b"), day=2)
    (table,) = tables([*runs("lora", 0.5, code=("t", "l")), *old, *new])
    row = table.row("mine")
    assert row is not None
    assert row.main.test.mean == pytest.approx(0.31)
    assert "Left out: 3 lines of other code, data or models." in caption(table)
    (table,) = tables([*runs("lora", 0.5, code=("t", "l")), *new, *runs("ia3", 0.2, code=("other", "i"))])
    assert list(said(table)) == ["lora", "mine"], "other code of the task is another task"
    (table,) = tables([*runs("mine", 0.9), *new[:1]])
    assert len(table.rows[0].main.runs) == 3, "lines that do not say their code stay"


def test_the_caption_says_what_was_swept() -> None:
    tried = [line(replace(FIRST, lr=lr, steps=12, whole=False), 0.3) for lr in (1e-3, 1e-1)]
    (swept,) = tables([*runs("lora", 0.5), *tried])
    assert "Rates from 0.001 to 0.1, chosen on validation" in caption(swept)
    (both,) = tables([*runs("lora", 0.5), *tried, *runs("vera", 0.5, lr=0.3)])
    assert "Stated, not swept: vera 0.3." in caption(both)
    (stated,) = tables(runs("lora", 0.5, seeds=1))
    assert caption(stated) == (
        "One seed: no interval can be given. Rates as the command, the protocol or the module (BENCH) states them, not "
        "swept. Seeds paired: same batches, same start. Test % of 300 examples, valid % of 100 examples."
    )


def test_the_captions_say_what_columns_are() -> None:
    (table,) = tables([*runs("lora", 0.5), *runs("dora", 0.5)])
    assert "Matched" not in caption(table), "the same numbers twice, in two columns, where no rank was matched"
    assert {cells(row)[4] for row in table.rows} == {"–"}
    matched = runs("dora", 0.6, column="matched")
    (table,) = tables([*runs("lora", 0.5), *runs("dora", 0.5), *matched])
    assert "–" not in {cells(row)[4] for row in table.rows}
    assert "Matched: with the rank that trains as many parameters as lora." in caption(table)
    table.rows[0].forgets = 0.4
    assert "Forgets %: points that the base's own task has lost." in caption(table)
    table.rows[0].costs = Costs(examples=32)
    words = costs_caption(table)
    assert "on a training batch of 32 examples. MACs: " in words
    assert all(f"{head}: " in words for head in ("× frozen", "Init", "Peak", "Reload error"))


def test_environments_that_do_not_contradict_each_other_are_one() -> None:
    """Each line names the package of its own method, beside the same machine."""
    here = {"torch": "2.6", "processor": "a"}
    lines = [{**here, "lora-lite-svd": "0.1"}, {**here, "lora-lite-ortho": "0.1"}, here, {**here, "torch": "2.7"}]
    found = environments([Record(FIRST, Result(), environment) for environment in lines])
    assert found == [({**here, "lora-lite-svd": "0.1", "lora-lite-ortho": "0.1"}, 3), ({**here, "torch": "2.7"}, 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--html", "r.jsonl"], "--html r.jsonl would replace a file of this command; give another name"),
        (["--markdown", "r.jsonl"], "--markdown r.jsonl would replace a file of this command"),
        (["--html", "a", "--markdown", "a"], "--markdown a would replace a file of this command"),
        (["--html", "no/a.html"], "--html no/a.html: folder no does not exist"),
        (["--markdown", "no/a.md"], "--markdown no/a.md: folder no does not exist"),
    ],
)
def test_a_report_replaces_nothing_that_it_reads(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.jsonl").write_text("results", encoding="utf-8")
    done = CliRunner().invoke(report, ["r.jsonl", *arguments])
    assert done.exit_code == 2
    assert message in done.output
    assert Path("r.jsonl").read_text(encoding="utf-8") == "results"
