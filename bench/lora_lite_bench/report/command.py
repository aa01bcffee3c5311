"""`lora-lite report`: results files as one page, pictures, a Markdown table; adapter files as pictures."""

from __future__ import annotations

import re
from pathlib import Path

import click

from lora_lite_core.contract.errors import LoraLiteError
from lora_lite_core.contract.text import count, plain, told

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
    _check_places(files, page, text)
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
    from .page import write, write_page
    from .pictures import pictures

    try:
        records = read(files, lambda text: click.echo(text, err=True))
    except LoraLiteError as error:
        raise click.ClickException(str(error)) from error
    made = tables(records)
    if not made:
        raise click.ClickException(f"no finished run in {', '.join(map(str, files))}; type: lora-lite bench")
    if page or not (png or text):
        write_page(page or Path("report.html"), records)
        click.echo(f"{page or 'report.html'}: {count(len(made), 'table')} of {count(len(records), 'line')}")
    if text:
        write(text, markdown(made))
        click.echo(f"{text}: {count(len(made), 'table')}")
    if png:
        names, drawn = [_file_name(table.task) for table in made], 0
        for number, (task, table) in enumerate(zip(names, made, strict=True)):
            task = f"{task}-{number}" if names.count(task) > 1 else task
            for name, _, figure in pictures(table):
                _put(png / f"{task}-{name}.png", as_png(figure))
                drawn += 1
        click.echo(f"{png}: {count(drawn, 'picture')}")


def _check_places(files: tuple[Path, ...], page: Path | None, text: Path | None) -> None:
    """Nothing that is read, or written already, is written over."""
    taken = {path.resolve() for path in files}
    for option, path in (("--html", page or Path("report.html")), ("--markdown", text)):
        if path is None:
            continue
        if path.resolve() in taken:
            raise click.UsageError(f"{option} {path} would replace a file of this command; give another name")
        if not path.parent.is_dir():
            raise click.UsageError(f"{option} {path}: folder {path.parent} does not exist")
        taken.add(path.resolve())


def _draw(path: Path, folder: Path) -> None:
    from .adapter_picture import adapter_picture
    from .page import png

    try:
        figure = adapter_picture(path)
    except LoraLiteError as error:
        raise click.ClickException(str(error)) from error
    made = folder / f"{path.stem}.png"
    _put(made, png(figure))
    click.echo(f"{made}: {path.name}")


def _file_name(task: str) -> str:
    """Of a task, which a file may have named like a place elsewhere."""
    return re.sub(r"[^\w.-]", "_", task)[:100]


def _put(path: Path, content: bytes) -> None:
    """Write a picture, and make its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise click.ClickException(f"{plain(path)} cannot be written: {told(error)}; give another --png DIR") from error
