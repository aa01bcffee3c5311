"""The command line: `lora-lite variants`, `lora-lite inspect`, and what other packages add to it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from ..contract.errors import LoraLiteError, UnknownVariant, did_you_mean, listed
from ..contract.text import paragraphs, plain, told
from ..discovery.entry_points import Entry, entries
from ..discovery.listing import describe, list_variants
from ..discovery.name_conflicts import COMMANDS, state_of
from ..files.adapter_file import inspect as inspect_file
from .exporting import export

GROUP = "lora_lite.commands"


class Commands(click.Group):
    """The core's commands and those of the entry-point group `lora_lite.commands`, imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *map(_shown, _installed())})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        installed = _installed()
        found = [(entry, *state_of(entry, installed, COMMANDS)) for entry in installed if _shown(entry) == cmd_name]
        own = super().get_command(ctx, cmd_name)
        if own is not None or not found:
            return own
        entry, state, detail = next((one for one in found if one[1] == "ok"), found[0])
        about = f"command '{cmd_name}' of {plain(entry.package.name or entry.value)}"
        if state != "ok":
            text = {"blocked": f"{about} is blocked by {detail}", "broken": f"{about} cannot be used: {detail}"}
            return _broken(cmd_name, text.get(state, detail), state)
        try:
            command = entry.load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit, too: a module that ends the program when it is imported
            return _broken(cmd_name, f"{about} cannot be imported: {told(error)}")
        if isinstance(command, click.Command):
            return command
        return _broken(cmd_name, f"{entry.value} is not a click command")

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if args and not args[0].startswith("-") and args[0] not in known:
            hint = f"\n  type: pip install {COMMANDS[args[0]]}" if args[0] in COMMANDS else ""
            raise click.UsageError(
                f"no command is called {plain(repr(args[0]))}{did_you_mean(args[0], known)}\n"
                f"  commands: {listed(known, 40)}{hint}"
            )
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LoraLiteError as error:
            raise click.ClickException(str(error)) from error


def _installed() -> list[Entry]:
    """The commands of other packages."""
    return entries(GROUP, objects=True)


def _shown(entry: Entry) -> str:
    """Its name, or what of it can be shown."""
    return plain(entry.name, 60) or "(unknown)"


def _broken(name: str, reason: str, state: str = "broken: cannot be imported") -> click.Command:
    def fail() -> None:
        raise click.ClickException(paragraphs(reason))

    return click.Command(name, callback=fail, short_help=f"({state})")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lora-lite-core", prog_name="lora-lite")
def main() -> None:
    """PyTorch adapters as plugins."""


@main.command(short_help="List the installed variants.")
@click.argument("pattern", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--check", is_flag=True, help="Import every variant and show what fails.")
def variants(pattern: str | None, as_json: bool, check: bool) -> None:
    """List the installed variants whose name matches PATTERN, as in 'ia3*'."""
    found = list_variants(pattern, check=check)
    click.echo(json.dumps(found.to_dicts(), indent=2) if as_json else repr(found))
    if check and any(info.state != "ok" for info in found):
        raise click.exceptions.Exit(1)


@main.command(short_help="Show what an adapter file holds, or what a variant is.")
@click.argument("subject", metavar="FILE|VARIANT")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(subject: str, as_json: bool) -> None:
    """Show what an adapter file holds, or what a variant is and how it is configured."""
    if Path(subject).suffix or os.path.isfile(subject):  # which, unlike Path's own, never raises
        file = inspect_file(subject)
        click.echo(json.dumps(file.to_dict(), indent=2) if as_json else str(file))
        return
    found = [info for info in list_variants() if info.name == subject]
    if not found:
        names = [info.name for info in list_variants()]
        raise UnknownVariant(
            f"'{subject}' is neither a file nor an installed variant{did_you_mean(subject, names)}\n"
            f"  variants: {listed(names, 40)}; adapter files end in .safetensors"
        )
    for info in found:
        about = describe(info)
        click.echo(json.dumps(about, indent=2) if as_json else _page(about))


@main.command(short_help="Check that a variant keeps every promise of the library.")
@click.argument("name", metavar="VARIANT|FILE.py")
@click.option("--set", "pairs", multiple=True, metavar="FIELD=VALUE", help="A config field, as in --set block_size=8.")
@click.option("--only", multiple=True, metavar="CHECK", help="Run this check alone; may be repeated.")
@click.option("--expect", multiple=True, metavar="CHECK", help="A check that is known to fail, and must.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(name: str, pairs: tuple[str, ...], only: tuple[str, ...], expect: tuple[str, ...], as_json: bool) -> None:
    """Check that VARIANT, or the one in a module's FILE, which is run, keeps every promise of the library (the
    conformance kit). r is 4 unless it is set."""
    from ..contract.config import RankConfig
    from ..contract.errors import ConfigError
    from ..discovery.registry import get_variant
    from ..testing import run_checks
    from ..testing.runner import CHECKS, tensors_of

    name = variant_at(name)
    Config = get_variant(name).Config
    rank: dict[str, Any] = {"r": 4} if issubclass(Config, RankConfig) else {}
    given = {**rank, **config_fields(pairs)}
    try:
        cfg = Config(**given)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:  # of a check that the author has written
        spelled = ", ".join(f"{field}={value!r}" for field, value in given.items())
        raise click.ClickException(f"{Config.__name__}({spelled}): {error}") from error
    results = run_checks(cfg, only=only, expected_failures=dict.fromkeys(expect, "--expect"))
    if as_json:
        click.echo(json.dumps([result.to_dict() for result in results], indent=2))
    else:
        width = max(len(result.name) for result in results)
        for result in results:
            click.echo(f"{result.name:{width}}  {result.outcome:19}  {result.seconds:5.1f} s")
        failed = [result for result in results if not result.ok]
        for result in failed:
            click.echo(f"\n{result.name}: {result.message or 'passes, although it is expected to fail'}")
        if results[0].ok:
            click.echo("\n" + "\n".join(tensors_of(cfg)))
        waiting = f", {len(CHECKS) - len(results)} not tried" if len(results) < len(CHECKS) and not only else ""
        click.echo(f"\n{name}: {len(results) - len(failed)} of {len(results)} promises kept{waiting}")
    if not all(result.ok for result in results):
        raise click.exceptions.Exit(1)


@main.command(short_help="Write a package with a working variant, to start from.")
@click.argument("name")
@click.option(
    "--folder", default=".", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Parent folder."
)
@click.option("--author", default="Your Name", show_default=True, help="For the licence, the citation and pip.")
@click.option("--from", "like", metavar="VARIANT", help="Start from a copy of this variant instead of a gained LoRA.")
def new(name: str, folder: Path, author: str, like: str | None) -> None:
    """Write a complete package lora-lite-NAME with a working variant, its tests and README, to start from."""
    from .scaffold import new_package

    try:
        made = new_package(name, folder, author, like)
    except FileExistsError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{plain(folder)} cannot be written: {error.strerror or error}") from error
    for path in sorted(path for path in made.rglob("*") if path.is_file()):
        click.echo(path)
    click.echo(f"\nnext: cd {made}; pip install -e '.[test]'; pytest")


main.add_command(export)


def variant_at(subject: str) -> str:
    """The name of a variant, or of the one that the module in a file is: such a file is run, and that is said."""
    if not subject.endswith(".py"):
        return subject
    from ..discovery.registry import register

    name = register(subject).name
    click.echo(f"{plain(name)}: {plain(subject)} is run", err=True)
    return name


def config_fields(pairs: Iterable[str]) -> dict[str, Any]:
    """`r=4`, `layers=[0, 1]`, `rotate_basis=both` as config fields; values are JSON, or text where they are not."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise click.BadParameter(f"{pair!r} is not FIELD=VALUE, as in --set r=16")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _page(about: dict[str, Any]) -> str:
    lines = [f"{about['name']}: {about['distribution']} {about['version']}, module {about['module']}, {about['state']}"]
    lines += [about["detail"]] if about["detail"] else []
    lines += ["", about["doc"], "", f"hooks: {', '.join(about['hooks'])}", f"config: {about['config']}"]
    lines += [f"    {name} = {value}" for name, value in about["fields"].items()]
    return paragraphs("\n".join(lines), 1000)
