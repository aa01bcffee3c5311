"""`lora-lite speed`: the command line. Heavy imports wait until it runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.table import Table

    from .contestants import Settings
    from .parts import Plan, Section

PARTS = ("model", "layers", "growth", "starts", "imports")
DTYPES = ("float32", "bfloat16", "float16")


@click.command(short_help="Time variants against Hugging Face PEFT and the frozen model.")
@click.argument("variants", nargs=-1, metavar="[VARIANT|FILE.py]...")
@click.option("--all", "everything", is_flag=True, help="Every installed variant, not a few of each kind.")
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="Repeatable.  [default: all of them]")
@click.option("--hidden", default=512, show_default=True, type=click.IntRange(64), help="Width of the model.")
@click.option("--rank", default=32, show_default=True, type=click.IntRange(2), help="r of the methods that have one.")
@click.option("--layers", default=2, show_default=True, type=click.IntRange(1), help="Transformer blocks of the model.")
@click.option("--batch", default=4, show_default=True, type=click.IntRange(1), help="Sequences in a training step.")
@click.option("--length", default=128, show_default=True, type=click.IntRange(1), help="Tokens in a sequence.")
@click.option(
    "--width", "widths", multiple=True, type=click.IntRange(64), help="Of single layers.  [default: 512 and 4096]"
)
@click.option(
    "--tokens", multiple=True, type=click.IntRange(1), help="Through single layers.  [default: 1, 128 and 2048]"
)
@click.option("--compiled", is_flag=True, help="Single layers compiled by torch.compile, too; it takes minutes.")
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(1), help="Timings of each step.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Of the processor.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), help="Repeatable.  [default: float32]")
@click.option("--device", help="As torch calls it.  [default: cuda where there is one, else cpu]")
@click.option("--quick", is_flag=True, help="Tiny sizes: a check that all works, not a result.")
@click.option("--out", default="speed.json", show_default=True, type=click.Path(path_type=Path), help="Overwritten.")
def speed(
    variants: tuple[str, ...],
    everything: bool,
    parts: tuple[str, ...],
    widths: tuple[int, ...],
    tokens: tuple[int, ...],
    compiled: bool,
    threads: int,
    dtypes: tuple[str, ...],
    quick: bool,
    out: Path,
    **sizes: Any,
) -> None:
    """Time VARIANTS (default: one of each kind, and all of other projects' packages) beside the same methods in PEFT
    (pip install peft), in LyCORIS where it is installed and has them, and beside the frozen model.

    \b
    model    a stack of transformer blocks, every linear layer adapted: a training step, a decoded token,
             attaching, saving, loading, peak memory
    layers   one linear layer, small and of a language model's size, for 1 to 2048 tokens, beside the floor:
             what its operations and bytes take at the best that this machine does
    growth   of LoRA (or of VARIANTS): with layers, rank and adapters
    starts   EVA's from data, PiSSA's from the weight
    imports  how long a new process takes to import

    Contestants take turns in one process, in random order. Times are medians of processor time (on CUDA, of events),
    ratios medians of ratios within rounds. Prints tables in Markdown and writes all numbers to speed.json.
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
    from .contestants import Settings, has_lycoris
    from .parts import Plan

    if not out.parent.is_dir():
        raise click.BadParameter(f"--out {out}: folder {out.parent} does not exist")
    sizes["device"] = sizes["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    if quick:
        sizes.update(hidden=64, rank=4, layers=1, batch=2, length=8, rounds=1)
        widths, tokens = widths or (64,), tokens or (1, 8)
    settings = Settings(**sizes)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    named = variant_names(variants, everything)
    plan = Plan(
        parts or PARTS, named, bool(variants), widths or (512, 4096), tokens or (1, 128, 2048),
        (False, True) if compiled else (False,), dtypes or ("float32",), quick,
    )  # fmt: skip
    sections = _measured(plan, settings)
    report: dict[str, Any] = {
        "machine": machine(settings.device),
        "versions": versions(
            "lora-lite-core", "torch", "transformers", "peft", "lycoris-lora" if has_lycoris() else ""
        ),
        "threads": threads,
        "settings": asdict(settings),
        "sections": [{"part": s.part, "title": s.title, **s.data} for s in sections],
    }
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    console = Console(width=220)
    console.print(f"{report['machine']}, {threads} thread(s), {settings}", highlight=False, soft_wrap=True)
    for section in sections:
        console.print(f"\n{section.title}\n", highlight=False)
        console.print(table(section.heads, section.cells))
        for note in section.notes:
            console.print(note, highlight=False, soft_wrap=True, markup=False)
    console.print(f"\nall samples are in {out}", highlight=False)


def _measured(plan: Plan, settings: Settings) -> list[Section]:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from .parts import WORK

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed:.0f} timings"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        bars: dict[str, Any] = {}

        def advance(kind: str) -> None:
            if kind not in bars:
                bars[kind] = progress.add_task(kind, total=None)
            progress.update(bars[kind], advance=1)

        return [section for part in PARTS if part in plan.parts for section in WORK[part](plan, settings, advance)]


def machine(device: str) -> str:
    import torch

    from ..comparing.results import processor

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.backends.cpu.get_cpu_capability()}"


def table(heads: tuple[str, ...], rows: list[list[str]]) -> Table:
    from rich.box import MARKDOWN
    from rich.table import Table

    made = Table(box=MARKDOWN)
    for number, head in enumerate(heads):
        made.add_column(head, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made
