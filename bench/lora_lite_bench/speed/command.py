"""`lora-lite speed`: the command line. Heavy imports wait until it runs."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.table import Table

    from .starts import InitRow
    from .steps import Measured, Settings

HEADS = (
    "method", "step ms", "/ PEFT", "/ PEFT wall", "/ frozen", "/ LoRA", "token ms", "/ PEFT", "/ frozen", "attach ms",
    "/ PEFT", "peak MB", "/ PEFT",
)  # fmt: skip
INIT_HEADS = ("start", "ms", "against", "ms", "ratio", "without forward", "error", "its error", "peak")


@click.command(short_help="Time variants against Hugging Face PEFT and the frozen model.")
@click.argument("variants", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every installed variant, not a few of each kind.")
@click.option("--hidden", default=512, show_default=True, type=click.IntRange(64), help="Width of the model.")
@click.option("--rank", default=32, show_default=True, type=click.IntRange(2), help="r of the methods that have one.")
@click.option("--layers", default=2, show_default=True, type=click.IntRange(1), help="Transformer blocks.")
@click.option("--batch", default=4, show_default=True, type=click.IntRange(1), help="Sequences in a training step.")
@click.option("--length", default=128, show_default=True, type=click.IntRange(1), help="Tokens in a sequence.")
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(1), help="Timings of each step.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Of the processor.")
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16", "float16"]))
@click.option("--device", help="As torch calls it.  [default: cuda where there is one, else cpu]")
@click.option("--no-init", is_flag=True, help="Leave out how long EVA and PiSSA take to start; they take minutes.")
@click.option("--quick", is_flag=True, help="Tiny sizes: a check that all works, not a result.")
@click.option("--out", default="speed.json", show_default=True, type=click.Path(path_type=Path), help="Overwritten.")
def speed(
    variants: tuple[str, ...],
    everything: bool,
    threads: int,
    no_init: bool,
    quick: bool,
    out: Path,
    **sizes: Any,
) -> None:
    """Time VARIANTS (default: one of each kind, and all of other projects' packages): a training step and a
    single-token pass of a stack of transformer blocks whose every linear layer is adapted, and attaching, beside the
    same method in PEFT (pip install peft) and the frozen model.

    Everything runs in one process, interleaved. Times are medians of processor time (on CUDA, of events), ratios
    medians of ratios within rounds. Prints a table in Markdown and writes all numbers to speed.json.
    """
    try:
        import peft  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise click.ClickException(
            "lora-lite speed compares with PEFT, which is not installed; type: pip install peft"
        ) from error
    import torch
    from rich.console import Console

    from ..command import variant_names
    from ..runs.run import versions
    from .steps import Settings, cases

    if not out.parent.is_dir():
        raise click.BadParameter(f"--out {out}: folder {out.parent} does not exist")
    sizes["device"] = sizes["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    if quick:
        sizes.update(hidden=64, rank=4, layers=1, batch=2, length=8, rounds=1)
    settings = Settings(**sizes)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    rows = cases(variant_names(variants, everything), settings)
    measured, starts = _measure(rows, settings, no_init, quick)
    report: dict[str, Any] = {
        "machine": machine(settings.device),
        "versions": versions("lora-lite-core", "torch", "transformers", "peft"),
        "threads": threads,
        "settings": asdict(settings),
        "rows": _rows_as_json(measured, settings),
        "starts": [asdict(row) for row in starts],
        "samples": measured.samples,
    }
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    console = Console(width=200)
    console.print(f"{report['machine']}, {threads} thread(s), {settings}", highlight=False, soft_wrap=True)
    console.print(table(HEADS, [cells(row) for row in report["rows"]]))
    if starts:
        console.print(table(INIT_HEADS, [init_cells(row) for row in starts]))
    console.print(f"all samples are in {out}", highlight=False)


def _measure(rows: Any, settings: Settings, no_init: bool, quick: bool) -> tuple[Measured, list[InitRow]]:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from .starts import InitSettings, eva, pissa
    from .steps import measure

    small = InitSettings(width=64, layers=2, rank=4, tokens=2048, rounds=1)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed:.0f} timings"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        bars: dict[str, Any] = {}

        def advance(kind: str) -> None:
            if kind not in bars:
                bars[kind] = progress.add_task(kind, total=None)
            progress.update(bars[kind], advance=1)

        measured = measure(rows, settings, advance)
        if no_init:
            return measured, []
        initial = small if quick else InitSettings()
        return measured, [row for start in (eva, pissa) for row in start(initial, lambda: advance("start"))]


def machine(device: str) -> str:
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = named[0] if named else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _rows_as_json(measured: Measured, settings: Settings) -> list[dict[str, Any]]:
    """One dict a row: milliseconds, and ratios to the twin in PEFT, the frozen model and the reference row."""
    from .steps import TOKENS_AT_ONCE, milliseconds, ratio, theirs

    which = 0 if settings.device.startswith("cuda") else 1  # events, or processor time
    frozen = {"label": "frozen", "peak_mb": measured.peak["frozen"] / 1e6}
    rows = [frozen]
    for kind, count in (("step", 1), ("token", TOKENS_AT_ONCE)):
        frozen[f"{kind}_ms"] = milliseconds(measured.samples[kind]["frozen"], which) / count
    for case in measured.cases:
        label, twin = case.label, theirs(case.label)
        row: dict[str, Any] = {
            "label": label,
            "config": case.config(settings).to_dict(),
            "trainable": measured.trainable[label],
            "peak_mb": measured.peak[label] / 1e6,
        }
        if twin in measured.peak:
            row["peak_peft"] = measured.peak[label] / measured.peak[twin]
        for kind, count in (("step", 1), ("token", TOKENS_AT_ONCE), ("attach", 1)):
            samples = measured.samples[kind]
            if label not in samples:
                continue
            row[f"{kind}_ms"] = milliseconds(samples[label], which) / count
            for name, other in (("peft", twin), ("frozen", "frozen"), ("lora", case.reference)):
                if other in samples:
                    row[f"{kind}_{name}"] = ratio(samples[label], samples[other], which)
                    row[f"{kind}_{name}_wall"] = ratio(samples[label], samples[other], 0)
        rows.append(row)
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    def number(key: str, digits: int) -> str:
        return f"{row[key]:.{digits}f}" if key in row else "–"

    return [
        row["label"], number("step_ms", 1), number("step_peft", 2), number("step_peft_wall", 2),
        number("step_frozen", 2), number("step_lora", 2), number("token_ms", 2), number("token_peft", 2),
        number("token_frozen", 2),
        number("attach_ms", 1), number("attach_peft", 2), number("peak_mb", 1), number("peak_peft", 2),
    ]  # fmt: skip


def init_cells(row: InitRow) -> list[str]:
    return [
        row.label, f"{row.ours_ms:,.0f}", row.against, f"{row.theirs_ms:,.0f}", f"{row.ratio:.2f}",
        "–" if row.beyond is None else f"{row.beyond:.2f}", f"{row.our_error:.0e}", f"{row.their_error:.0e}",
        row.memory or "–",
    ]  # fmt: skip


def table(heads: tuple[str, ...], rows: list[list[str]]) -> Table:
    from rich.box import MARKDOWN
    from rich.table import Table

    made = Table(box=MARKDOWN)
    for number, head in enumerate(heads):
        made.add_column(head, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made
