"""`lora-lite report`: results files as one page, pictures, a Markdown table; adapter files as pictures."""

from __future__ import annotations

from pathlib import Path

import click

from lora_lite_core.contract.errors import LoraLiteError

OUT = click.Path(path_type=Path, dir_okay=False)


@click.command(short_help="Tables and pictures of what `lora-lite bench` measured, as one HTML file.")
@click.argument(
    "files", nargs=-1, required=True, metavar="FILE...", type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option(
    "--html",
    "page",
    type=OUT,
    help="One file with everything in it.  [default: report.html, where no other is asked for]",
)
@click.option(
    "--png",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="The pictures as PNG files, made in this folder.  [default: this one, for adapter files]",
)
@click.option("--markdown", "text", type=OUT, help="The tables as Markdown.")
def report(files: tuple[Path, ...], page: Path | None, png: Path | None, text: Path | None) -> None:
    """Merge the results FILES of `lora-lite bench` into one report.

    Of the same run in several files the last is taken. The page holds its pictures and asks nothing of the network.

    An adapter file, FILE.safetensors, of AntiPaSTO, its family or SSVD becomes FILE.png: how far singular values are
    shifted and singular directions turned, layer by layer.
    """
    adapters = [path for path in files if path.suffix == ".safetensors"]
    files = tuple(path for path in files if path not in adapters)
    if not files and (page or text):
        raise click.UsageError("--html and --markdown are of results; of adapter files there are pictures alone")
    for path in adapters:
        _draw(path, png or Path())
    if not files:
        return
    from ..comparing.results import read
    from ..comparing.table import tables
    from .markdown import markdown
    from .page import png as as_png
    from .page import write_page
    from .pictures import pictures

    try:
        records = read(files)
    except LoraLiteError as error:
        raise click.ClickException(str(error)) from error
    made = tables(records)
    if not made:
        raise click.ClickException(f"no finished run in {', '.join(map(str, files))}; type: lora-lite bench")
    if page or not (png or text):
        write_page(page or Path("report.html"), records)
        click.echo(f"{page or 'report.html'}: {len(made)} tables of {len(records)} lines")
    if text:
        text.write_text(markdown(made), encoding="utf-8")
        click.echo(f"{text}: {len(made)} tables")
    if png:
        png.mkdir(parents=True, exist_ok=True)
        names = [table.task for table in made]
        for number, table in enumerate(made):
            task = f"{table.task}-{number}" if names.count(table.task) > 1 else table.task
            for name, _, figure in pictures(table):
                (png / f"{task}-{name}.png").write_bytes(as_png(figure))
        click.echo(f"{png}: {len(list(png.glob('*.png')))} pictures")


def _draw(path: Path, folder: Path) -> None:
    from .adapter_picture import adapter_picture
    from .page import png

    try:
        figure = adapter_picture(path)
    except LoraLiteError as error:
        raise click.ClickException(str(error)) from error
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{path.stem}.png"
    made.write_bytes(png(figure))
    click.echo(f"{made}: {path.name}")
