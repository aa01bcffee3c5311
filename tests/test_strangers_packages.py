"""Any installed package: a row in the listing, a typed error when it is asked for, and the others work as before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

import lora_lite as ll
from lora_lite_core.cli import commands as cli
from lora_lite_core.discovery import entry_points, listing, registry

from . import hostile_packages as hostile
from .hostile_files import at_once, safe
from .hostile_packages import Case, install

CASES = {
    f"{kind}: {name}": case
    for kind, cases in (
        ("source", hostile.SOURCES),
        ("entry point", hostile.POINTS),
        ("metadata", hostile.METADATAS),
        ("import", hostile.IMPORTS),
    )
    for name, case in cases.items()
}
FIRST_PARTY = set(registry.FIRST_PARTY)


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_package(name: str, site: Path) -> None:
    case = CASES[name]
    install(site, case)
    with at_once():
        rows = ll.list_variants()
        shown = repr(rows)
    assert safe(shown), shown
    assert safe(rows._repr_html_().replace("</", "\n"), 100_000)
    assert len(json.dumps(rows.to_dicts())) < 100_000
    assert {info.name for info in rows if info.state == "ok"} >= FIRST_PARTY
    (theirs, *more) = [info for info in rows if info.name not in FIRST_PARTY]
    assert len(more) == {"entry point: thousands": 100, "entry point: twice": 1}.get(name, 0)
    assert theirs.state == case.state, theirs
    assert case.detail in theirs.detail
    described = json.dumps(listing.describe(theirs))
    assert len(described) < 300_000
    if case.error:
        with at_once(), pytest.raises(ll.LoraLiteError) as caught:
            ll.get_variant(case.name)
        assert case.error in str(caught.value), str(caught.value)
        assert safe(str(caught.value)), str(caught.value)


def test_the_table_of_packages_is_long() -> None:
    assert len(CASES) > 80


@pytest.mark.parametrize(
    "name",
    [
        "source: escapes in the docstring",
        "source: lambdas",
        f"entry point: name {hostile.ESCAPES!r}"[:53],
        "metadata: a version of escapes",
    ],
)
def test_the_command_line_shows_it(name: str, site: Path) -> None:
    install(site, CASES[name])
    for arguments in (
        ["variants"],
        ["variants", "--json"],
        ["inspect", "evil"],
        ["inspect", "evil", "--json"],
        ["inspect", "evli\x1b[2J"],
    ):
        done = CliRunner().invoke(cli.main, arguments)
        assert done.exception is None or isinstance(done.exception, SystemExit), (arguments, done.exception)
        assert safe(done.output), (arguments, done.output)


def test_a_plugin_that_ends_the_program_is_a_row_of_the_check(site: Path) -> None:
    install(site, CASES["import: exit"])
    (info,) = ll.list_variants("evil", check=True)
    assert (info.state, "SystemExit: bye" in info.detail) == ("broken", True)


def test_compiled_plugins_are_listed(site: Path) -> None:
    install(site, Case(source=None, value="lora_lite_evil.inner"))
    (site / "lora_lite_evil").mkdir()
    (site / "lora_lite_evil/inner.pyc").write_bytes(b"\0")
    (info,) = ll.list_variants("evil")
    assert (info.state, info.summary) == ("ok", "")


def test_much_source_of_one_package_is_not_read(site: Path) -> None:
    names = [f"v{i}" for i in range(9)]
    for name in names:
        (site / f"{name}.py").write_text(f'"""{"d" * 100_000}"""', encoding="utf-8")
    install(site, Case(points="[lora_lite.variants]\n" + "".join(f"{name} = {name}\n" for name in names)))
    rows = ll.list_variants("v?")
    assert [info.state for info in rows] == ["ok"] * 6 + ["broken"] * 3
    assert "more than 524,288 bytes of source" in rows[-1].detail


def test_a_finder_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[object]:
        yield from ()
        raise ValueError("\x1b[2J")

    monkeypatch.setattr(entry_points, "distributions", broken)
    (info,) = ll.list_variants()
    assert info.detail == "installed packages cannot be listed to the end: ValueError: \\x1b[2J"


def test_commands_of_strangers(site: Path) -> None:
    lines = {"sick": "sys:exit", "exit": "lora_lite_evil:x", "text": "json:dumps", "colon": "a:b:c", "variants": "json:dumps", hostile.ESCAPES: "json", "none": ""}  # fmt: skip
    points = "[lora_lite.commands]\n" + "".join(f"{name} = {value}\n" for name, value in lines.items())
    install(site, Case(source="raise SystemExit(3)", points=points + "nothing\n"))
    done = CliRunner().invoke(cli.main, ["--help"])
    assert done.exit_code == 0
    assert safe(done.output)
    assert done.output.count("(broken") == 7
    for name, text in {
        "exit": "command 'exit' of lora-lite-evil cannot be imported: SystemExit: 3",
        "text": "json:dumps is not a click command",
        "colon": "'a:b:c' names no module",
        "nothing": "'' names no module",
        "sick\x1b[2J": "no command is called 'sick\\x1b[2J'; did you mean 'sick'?",
    }.items():
        done = CliRunner().invoke(cli.main, [name])
        assert done.exit_code in (1, 2)
        assert text in done.output
        assert safe(done.output)
    assert CliRunner().invoke(cli.main, ["variants"]).exit_code == 0, "the core's own command"
