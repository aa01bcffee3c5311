"""What stands below a table: what its numbers are, in plain words."""

from __future__ import annotations

from lora_lite_core.contract.text import count, plain

from ..runs.methods import ANCHORS, FROZEN, REFERENCE
from .noise import LEVEL
from .table import Row, TaskTable

LONGEST = 8_000  # characters


def caption(table: TaskTable) -> str:
    """How many seeds and examples, which rates were swept, and what is not as in the other rows, made `plain`."""
    several = any(len(row.main.runs) > 1 for row in table.rows)
    sentences = [
        f"± {LEVEL:.0%} interval of the mean over seeds" if several else "One seed: no interval can be given",
        *_rates([row for row in table.rows if row.method != FROZEN]),
        "Seeds paired: same batches, same start",
    ]
    if several:
        sentences.append(f"Each verdict is {LEVEL:.0%} sure by itself: of 20, expect one to be chance")
    sentences += [*_stopped(table.rows), *_examples(table.rows), *_other_steps(table)]
    sentences += _words(table.rows)
    sentences += dict.fromkeys(note for row in table.rows for note in row.first.notes)
    if table.left_out:
        sentences.append(f"Left out: {count(table.left_out, 'line')} of other code, data or models")
    return plain(". ".join(sentences) + ".", LONGEST)


def costs_caption(table: TaskTable) -> str:
    """What stands below the table of costs."""
    counts = sorted({row.costs.examples for row in table.rows if row.costs and row.costs.examples})
    step = f"a training batch of {' or '.join(map(str, counts))} examples" if counts else "a training batch"
    return (
        f"Measured alone, in turn with the frozen model, whose backward pass reaches the embeddings, on {step}. "
        "MACs: multiply-accumulates that the adapter's matrix products add. × frozen: fwd and bwd together. Init: the "
        "adapter's start. Peak: tensors made during a first step. Reload error: largest difference of outputs after "
        "save and load onto a fresh model."
    )


def _rates(rows: list[Row]) -> list[str]:
    tried = sorted({lr for row in rows if row.swept for lr, _ in row.curve if lr})
    stated = [f"{row.label} {row.main.lr:.2g}" for row in rows if not row.swept]
    if not tried:
        return ["Rates as the command, the protocol or the module (BENCH) states them, not swept"] if stated else []
    said = f"Rates from {tried[0]:.2g} to {tried[-1]:.2g}, chosen on validation, reported on test"
    return [said, *([f"Stated, not swept: {', '.join(stated)}"] if stated else [])]


def _stopped(rows: list[Row]) -> list[str]:
    """Whose runs were stopped, of those that are reported."""
    of = [(row, sum(bool(run.stopped) for run in row.main.runs.values())) for row in rows]
    said = [f"{row.label} in {number} of {count(len(row.main.runs), 'seed')}" for row, number in of if number]
    return [f"Training fell apart, and counts as 0 %: {', '.join(said)}"] if said else []


def _examples(rows: list[Row]) -> list[str]:
    """Of the splits, where the lines say it: how fine a score can be."""
    said = list[str]()
    for split in ("test", "valid"):
        counts = sorted({row.first.examples[split] for row in rows if split in row.first.examples})
        said += [f"{split} % of {' or '.join(f'{n:,}' for n in counts)} examples"] if counts else []
    return [", ".join(said).capitalize()] if said else []


def _other_steps(table: TaskTable) -> list[str]:
    rows = [row for row in table.rows if row.method != FROZEN and row.main.steps != table.steps]
    other = ", ".join(f"{row.label} {row.main.steps:,}" for row in rows)
    return [f"Trained for steps of its own, as its module states (BENCH): {other}"] if other else []


def _words(rows: list[Row]) -> list[str]:
    """What the columns are that are there for some tables only."""
    methods, said = {row.method for row in rows} - {*ANCHORS}, list[str]()
    if any("matched" in row.scores for row in rows):
        said.append(f"Matched: with the rank that trains as many parameters as {REFERENCE}")
    elif {REFERENCE} < methods:
        said.append(f"Each at its own rank: a column with as many parameters as {REFERENCE} is made by --full")
    if any(row.forgets for row in rows):
        said.append("Forgets %: points that the base's own task has lost")
    return said
