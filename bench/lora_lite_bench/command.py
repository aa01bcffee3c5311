"""`lora-lite bench`: the command line. Heavy imports wait until it runs."""

from __future__ import annotations

import io
import json
import re
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_lite_core.cli import config_fields, variant_at

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from .run import Plan, Result


@click.command(short_help="Train, save, reload and compare variants on a small language model.")
@click.argument("variants", nargs=-1, metavar="[VARIANT|FILE.py]...")
@click.option("--quick", is_flag=True, help="Few steps and problems: a check that all works, not a result.")
@click.option("--seed", default=0, show_default=True, help="Seed of the first run.")
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(1), help="Runs per variant.")
@click.option(
    "--steps",
    type=click.IntRange(10),
    help="Training steps.  [default: 120, or a module's own: BENCH; 30 with --quick]",
)
@click.option("--lr", type=float, help="Learning rate for all.  [default: per variant; a module states its own: BENCH]")
@click.option("--set", "fields", multiple=True, metavar="FIELD=VALUE", help="A config field for all, as in --set r=16.")
@click.option("--out", default="results.jsonl", show_default=True, type=click.Path(path_type=Path), help="Appended to.")
@click.option("--picture", type=click.Path(path_type=Path, dir_okay=False), help="The table as an SVG file, too.")
@click.option("--base", type=click.Path(path_type=Path, file_okay=False), help="Folder of another base model.")
@click.option("--make-base", is_flag=True, help="Train the base model anew, into --base (default lora-lite-base).")
def bench(
    variants: tuple[str, ...],
    quick: bool,
    seed: int,
    seeds: int,
    steps: int | None,
    lr: float | None,
    fields: tuple[str, ...],
    out: Path,
    picture: Path | None,
    base: Path | None,
    make_base: bool,
) -> None:
    """Train VARIANTS (default: all installed; FILE.py runs a module's file) on a task that the base model cannot do.

    Every variant is attached, trained, scored by exact match of generated answers, saved, reloaded onto a fresh base
    and checked to give the same logits. Needs no network. Prints a table and appends one line per run to results.jsonl.
    """
    import torch
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
    from transformers.utils import logging

    from .run import QUICK, Plan

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_float32_matmul_precision("highest")
    console = Console()
    columns = (*Progress.get_default_columns()[:3], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        if make_base:
            _make_base(base or Path("lora-lite-base"), steps or 1500, seed, progress, console)
            return
        if base is not None and not (base / "config.json").is_file():
            raise click.BadParameter(f"--base {base} holds no model (no config.json)")
        for path in filter(None, (out, picture)):
            if not path.parent.is_dir():
                raise click.BadParameter(f"folder {path.parent} of {path} does not exist")
        plan = QUICK if quick else Plan()
        plan = replace(plan, lr=lr, steps=steps or plan.steps, own_steps=not (steps or quick), base=(base or plan.base))
        results, failures = _run_all(
            variant_names(variants), config_fields(fields), range(seed, seed + seeds), plan, progress, out
        )
    scores = _base_scores(plan)
    wide = Console(width=max(console.width, 150)) if not console.is_terminal else console
    wide.print(_table(results, scores, plan))
    if picture is not None:
        _draw(_table(results, scores, plan), picture)
    console.print(f"{len(results)} runs appended to {out}", highlight=False)
    if failures:
        raise click.ClickException("\n".join(f"{name} failed: {reason}" for name, reason in failures.items()))


def _draw(table: Table, path: Path) -> None:
    """The table as a picture of a terminal, in the reader's own monospace font: rich would fetch one."""
    from rich.console import Console

    canvas = Console(record=True, width=200, file=io.StringIO(), color_system="truecolor")
    canvas.width = canvas.measure(table).maximum
    canvas.print(table)
    drawn = re.sub(r"@font-face \{.*?\}", "", canvas.export_svg(title="lora-lite bench"), flags=re.S)
    path.write_text(drawn.replace("Fira Code, ", ""), encoding="utf-8")


def variant_names(asked: tuple[str, ...]) -> list[str]:
    import lora_lite_core as ll

    if asked:
        return [ll.get_variant(variant_at(name)).name for name in dict.fromkeys(asked)]
    return [info.name for info in ll.list_variants() if info.state == "ok" and _goes_without(info.name)]


def _goes_without(name: str) -> bool:
    """Whether a variant has a config without settings, and serves linear layers, as those of the bench are."""
    import lora_lite_core as ll

    variant = ll.get_variant(name)
    try:
        variant.Config()
    except (ll.ConfigError, TypeError):
        return False
    return "linear" in variant.layers


def _make_base(folder: Path, steps: int, seed: int, progress: Progress, console: Console) -> None:
    from . import base

    scores = base.make_base(folder, steps=steps, seed=seed, progress=progress)
    console.print(f"{folder}: {scores['own']:.1%} on its own task, {scores['shifted']:.1%} on the shifted one")


def _run_all(
    names: list[str], fields: dict[str, Any], seeds: range, plan: Plan, progress: Progress, out: Path
) -> tuple[list[Result], dict[str, str]]:
    import lora_lite_core as ll

    from .run import config_for, plan_for, run

    for name in names:  # a field that does not fit is said before anything is trained
        try:
            config_for(name, fields)
        except ll.LoraLiteError as error:
            raise click.ClickException(f"{name} failed: {error}") from error
    results: list[Result] = []
    failures: dict[str, str] = {}
    overall = progress.add_task("runs", total=len(names) * len(seeds))
    for name in names:
        own = plan_for(name, plan)
        for seed in seeds:
            bar = progress.add_task(name, total=own.steps)
            try:
                result = run(
                    name, fields, seed, own, lambda text, bar=bar: progress.update(bar, advance=1, description=text)
                )
            except Exception as error:  # one broken plugin must not end the comparison of the others
                failures[name] = str(error) if isinstance(error, (ll.LoraLiteError, RuntimeError)) else repr(error)
            else:
                results.append(result)
                with out.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **asdict(result)}) + "\n")
            progress.update(overall, advance=1)
    return results, failures


def _base_scores(plan: Plan) -> dict[str, float]:
    from .base import exact_match, load_base
    from .tasks import problems

    model, tokenizer = load_base(plan.base)
    own = exact_match(model, tokenizer, problems("own", "test", plan.test_problems, seed=0))
    return {
        "own": own,
        "shifted": exact_match(model, tokenizer, problems("shifted", "test", plan.test_problems, seed=0)),
    }


def _table(results: list[Result], base: dict[str, float], plan: Plan) -> Table:
    from rich.table import Table

    from .summary import rows

    own = {r.variant: r.plan["steps"] for r in results if r.plan["steps"] != plan.steps}
    others = "".join(f", {name} {steps}" for name, steps in own.items())
    table = Table(
        title=f"shifted task, {plan.steps} steps{others}; the base model scores {base['own']:.1%} on its own task "
        f"and {base['shifted']:.1%} on this one",
        caption=f"exact match of generated answers, {plan.test_problems} test problems; ± is one standard error",
        title_style="bold",
    )
    heads = (
        "variant",
        "r",
        "test %",
        "valid %",
        "trainable",
        "MACs/token",
        "fwd ms",
        "bwd ms",
        "init s",
        "peak MB",
        "reload error",
    )
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left", no_wrap=True)
    for row in rows(results):
        table.add_row(*row)
    return table
