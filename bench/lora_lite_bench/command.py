"""`lora-lite bench`: the command line. Heavy imports wait until it runs."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_lite_core.cli import config_fields, variant_at
from lora_lite_core.contract.errors import LoraLiteError
from lora_lite_core.contract.text import count

if TYPE_CHECKING:
    from .comparing.comparison import Comparison


def _positive(context: click.Context, option: click.Parameter, value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise click.BadParameter(f"{value:g} is no learning rate; give one above 0, as in --lr 1e-3")
    return value


@click.command(short_help="Train and compare variants on small tasks: paired seeds, swept rates, anchors.")
@click.argument("variants", nargs=-1, metavar="[VARIANT|FILE.py]...")
@click.option(
    "--task", "tasks", multiple=True, metavar="NAME", help="Repeatable.  [default: shifted; with --full all but gsm8k]"
)
@click.option("--knob", "knobs", multiple=True, metavar="FIELD=VALUE", help="Of the tasks, as in --knob facts=512.")
@click.option("--all", "everything", is_flag=True, help="Every installed variant, not a few of each kind.")
@click.option("--full", is_flag=True, help="All small tasks, longer training, wider sweeps, matched parameter counts.")
@click.option("--quick", is_flag=True, help="Few steps, rates and seeds: a check that all works, not a result.")
@click.option("--protocol", default="", metavar="NAME|FOLDER", help="A task's named settings: peft, lora-lite (gsm8k).")
@click.option("--seed", type=click.IntRange(0, 2**32), help="The first of the seeds.  [default: 0, or the protocol's]")
@click.option("--seeds", type=click.IntRange(1), help="How many.  [default: 5, or the protocol's; 2 with --quick]")
@click.option(
    "--steps", type=click.IntRange(8), help="Training steps.  [default: the task's, or a module's own: BENCH]"
)
@click.option(
    "--lr",
    type=float,
    callback=_positive,
    help="Learning rate for all variants.  [default: a protocol's or module's own; else swept]",
)
@click.option("--sweep", is_flag=True, help="Sweep for variants that state a rate of their own, too.")
@click.option("--set", "fields", multiple=True, metavar="FIELD=VALUE", help="A config field for all, as in --set r=16.")
@click.option("--anchors/--no-anchors", default=True, help="Frozen, full fine-tuning, head only.  [default: with them]")
@click.option(
    "--jobs", type=click.IntRange(1), help="Runs side by side.  [default: one a core; 1 keeps to this process]"
)
@click.option(
    "--out",
    default="results.jsonl",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Added to; what it has is not run again. The report is written beside it, as .html.",
)
@click.option("--base", "--model", "base", metavar="NAME|FOLDER", help="Another base model.")
@click.option("--data", metavar="DIR", help="Folder with the task's data, where there is no network (gsm8k).")
@click.option("--quantize", metavar="nf4|int8", help="Load the base in 4 or 8 bits (gsm8k).")
@click.option("--make-base", is_flag=True, help="Train the base model anew, into --base (default lora-lite-base).")
def bench(
    variants: tuple[str, ...],
    tasks: tuple[str, ...],
    knobs: tuple[str, ...],
    everything: bool,
    full: bool,
    quick: bool,
    protocol: str,
    seed: int | None,
    seeds: int | None,
    steps: int | None,
    lr: float | None,
    sweep: bool,
    fields: tuple[str, ...],
    anchors: bool,
    jobs: int | None,
    out: Path,
    base: str | None,
    data: str | None,
    quantize: str | None,
    make_base: bool,
) -> None:
    """Train VARIANTS (default: one of each kind, and all of other projects' packages; FILE.py runs a module's file) on
    tasks that the base model cannot do.

    Every variant has its learning rate swept on the validation split (by successive halving), is trained on the same
    batches for every seed, scored on the test split, saved, reloaded onto a fresh base and checked to compute the same.
    Needs no network, but for the task gsm8k, which takes a language model (--model) and its data (--data) from the hub
    or from folders, one run after the other. Prints a table, adds one line per run to results.jsonl and writes the
    report results.html. Stopped, the same command goes on where it was.
    """
    from .machine.forks import begin_importing

    begin_importing(1 if "gsm8k" in tasks else jobs)
    from rich.console import Console

    from .comparing.comparison import Comparison
    from .machine.processes import processes
    from .tasks import small_task_names

    try:
        main = processes().main
    except LoraLiteError as error:
        raise click.ClickException(str(error)) from error
    if make_base:
        _make_base(Path(base or "lora-lite-base"), steps or 1500, seed or 0)
        return
    if not out.parent.is_dir():
        raise click.BadParameter(f"folder {out.parent} of {out} does not exist")
    if out.suffix == ".html":
        another = out.with_suffix(".jsonl")
        raise click.BadParameter(f"--out {out} would be the report's own name; give another, as {another}")
    if full and quick:
        raise click.UsageError("--full and --quick: give one of them")
    names, files = _named(variants, everything)
    named = {"model": base, "data": data, "quantize": quantize}
    comparison = Comparison(
        tasks=tasks or (tuple(small_task_names()) if full else ("shifted",)),
        knobs=config_fields(knobs)
        | {name: os.path.expanduser(value) for name, value in named.items() if value is not None},
        methods=names,
        files=files,
        fields=config_fields(fields),
        seed=seed,
        seeds=seeds,
        steps=steps,
        lr=lr,
        sweep=sweep or full,
        anchors=anchors,
        all_methods=not variants,
        size="full" if full else "quick" if quick else "short",
        protocol=protocol,
    )
    failures = _carry_out(comparison, jobs, out, Console(stderr=True))
    if main:
        _show(comparison, out)
    processes().end()
    if failures:
        raise click.ClickException("\n".join(f"{name} failed: {reason}" for name, reason in failures.items()))


def _carry_out(comparison: Comparison, jobs: int | None, out: Path, console: Any) -> dict[str, str]:
    from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn

    from .comparing.results import ResultsFile
    from .machine.forks import cores
    from .machine.processes import processes

    columns = (*Progress.get_default_columns()[:3], TimeElapsedColumn(), "elapsed,", TimeRemainingColumn(), "left")
    with Progress(*columns, console=console, disable=not processes().main) as progress:
        try:
            file = processes().main_first(lambda: ResultsFile(out, writes=processes().main))
            if file.cut:
                console.print(
                    f"{out}: the last line was cut off while it was written; its run is made again", markup=False
                )
            return comparison.carry_out(file, jobs or cores(), progress)
        except KeyboardInterrupt:
            said = f"stopped; what is finished is in {out}, and the same command goes on from there"
            console.print(said, markup=False)
            return {}
        except LoraLiteError as error:
            raise click.ClickException(str(error)) from error


def _show(comparison: Comparison, out: Path) -> None:
    from rich.console import Console

    from .comparing.results import read
    from .comparing.table import tables
    from .report.page import write_page
    from .report.terminal import terminal_tables

    if not out.exists():  # not one run was finished
        return
    console = Console()
    wide = Console(width=max(console.width, 150)) if not console.is_terminal else console
    records = read([out])
    made = tables(records, comparison.asked)
    shown = [table for table in made if table.holds(comparison.asked)]
    for table in shown:
        for one in terminal_tables(table):
            wide.print(one)
    if comparison.size == "quick":
        click.echo("--quick: a check that all works, not a result")
    click.echo(f"{count(len(records), 'line')} in {out}")
    if made:
        page = out.with_suffix(".html")
        write_page(page, records, comparison.asked)
        more = count(len(made) - len(shown), "other table")
        click.echo(f"pictures: {page}" + (f", with {more}" if len(made) > len(shown) else ""))


def _named(asked: tuple[str, ...], everything: bool) -> tuple[tuple[str, ...], dict[str, str]]:
    """The names of what was asked for, and the files that some of them are in."""
    names = variant_names(asked, everything)
    files = {
        name: str(Path(one).resolve())
        for one, name in zip(dict.fromkeys(asked), names, strict=False)
        if one.endswith(".py")
    }
    return tuple(dict.fromkeys(names)), files


# A method of each kind, for a first table in minutes; every variant of another project's package comes with them.
FEW = ("dora", "ia3", "lora", "lora_xs", "oft", "pissa", "vera")


def variant_names(asked: tuple[str, ...], everything: bool = False) -> list[str]:
    """Those asked for, by name or as files; or all that are installed; or a few of ours with all of others."""
    import lora_lite_core as ll
    from lora_lite_core.discovery.name_conflicts import FIRST_PARTY

    if asked:
        return [ll.get_variant(variant_at(name)).name for name in dict.fromkeys(asked)]
    usable = [info.name for info in ll.list_variants() if info.state == "ok"]
    chosen = usable if everything else [name for name in usable if name in FEW or name not in FIRST_PARTY]
    return [name for name in chosen if _goes_without(name)]


def _goes_without(name: str) -> bool:
    """Whether a variant has a config without settings, and serves linear layers, as those of the bench are."""
    import lora_lite_core as ll

    variant = ll.get_variant(name)
    try:
        variant.Config()
    except (ll.ConfigError, TypeError):
        return False
    return "linear" in variant.layers


def _make_base(folder: Path, steps: int, seed: int) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from .tasks.language.base_model import make_base

    console = Console()
    with Progress(console=Console(stderr=True)) as progress:
        scores = make_base(folder, steps=steps, seed=seed, progress=progress)
    console.print(f"{folder}: {scores['own']:.1%} on its own task, {scores['shifted']:.1%} on the shifted one")
