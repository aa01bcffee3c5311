"""The command `lora-lite export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource


@click.command(short_help="Write an adapter file as a folder for PEFT, vLLM, SGLang, llama.cpp.")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--base", required=True, help="Folder or name of the base model, as transformers loads it.")
@click.option("--to", "directory", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--rank", type=click.IntRange(1), help="Of the LoRA.  [default: the smallest that keeps --tol]")
@click.option("--tol", default=1e-5, show_default=True, help="Largest relative error of a layer's change.")
@click.option("--dtype", default="float32", show_default=True, help="Of the factors: float32, float16, bfloat16.")
@click.option("--served", metavar="CLASS", help="The class that is served, where it is not the base's: layers' names.")
@click.option("--check", "text", metavar="TEXT", help="Write a check prompt: this text, and what it is answered.")
@click.option("--verify", "engine", metavar="ENGINE", help="Let peft, vllm … generate from the check prompt, too.")
@click.option("--own-form", is_flag=True, help="PEFT's own format of the method (DoRA, IA3, HRA …), not a LoRA.")
def export(file: Path, base: str, directory: Path, own_form: bool, **lora: Any) -> None:
    """Write the adapter in FILE as a folder that PEFT, transformers, vLLM, SGLang and llama.cpp load."""
    from ..files.load import load
    from ..files.peft.exporting import export_peft
    from ..files.peft.serving.verifying import load_base

    source = click.get_current_context().get_parameter_source
    if own_form and any(source(key) is ParameterSource.COMMANDLINE for key in lora):
        raise click.UsageError("--rank, --tol, --dtype, --served, --check and --verify are for a LoRA, not --own-form")
    model = load_base(base)
    load(model, file, trainable=False)
    if own_form:
        export_peft(model, directory)
        click.echo(f"written: {directory}")
    else:
        _as_lora(model, base, directory, **lora)


def _as_lora(model: Any, base: str, directory: Path, engine: str | None, text: str | None, **options: Any) -> None:
    from ..files.peft.serving.as_lora import export_lora
    from ..files.peft.serving.verifying import verify_export

    check: Any = _ids(base, text) if text is not None else engine is not None
    click.echo(str(export_lora(model, directory, check=check, **options)))
    if engine is not None:
        verified = verify_export(directory, base, engine=engine)
        click.echo(f"{engine} generates the same {len(verified.tokens)} tokens")


def _ids(base: str, text: str) -> list[int]:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base)(text)["input_ids"]
    except Exception as error:  # whatever transformers makes of a folder
        raise click.ClickException(f"--check takes the base's tokenizer, which cannot be loaded: {error}") from error
