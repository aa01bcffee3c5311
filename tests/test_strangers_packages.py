"""Any installed package: a row in the listing, a typed error when it is asked for, and the others work as before."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import lora_lite as ll
from lora_lite_core.cli import commands as cli
from lora_lite_core.contract.checked import forget
from lora_lite_core.discovery import listing, packages, registry

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


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of sys.path, forgotten after the test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_loaded", {})
    yield tmp_path
    for name in [name for name, module in sys.modules.items() if str(tmp_path) in str(vars(module).get("__file__"))]:
        forget(sys.modules.pop(name))


def package(folder: Path, name: str, variant: str, source: str | None = None) -> None:
    """A sound package of one variant."""
    stem = name.replace("-", "_").lower()
    (folder / f"{stem}.py").write_text(source or hostile.GOOD.replace("evil", variant), encoding="utf-8")
    (folder / f"{stem}-1.5.dist-info").mkdir()
    (folder / f"{stem}-1.5.dist-info/METADATA").write_text(f"Name: {name}\nVersion: 1.5\n", encoding="utf-8")
    points = f"[lora_lite.variants]\n{variant} = {stem}\n"
    (folder / f"{stem}-1.5.dist-info/entry_points.txt").write_text(points, encoding="utf-8")


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_package(name: str, folder: Path) -> None:
    case = CASES[name]
    install(folder, case)
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
def test_the_command_line_shows_it(name: str, folder: Path) -> None:
    install(folder, CASES[name])
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


def test_a_plugin_that_ends_the_program_is_a_row_of_the_check(folder: Path) -> None:
    install(folder, CASES["import: exit"])
    (info,) = ll.list_variants("evil", check=True)
    assert (info.state, "SystemExit: bye" in info.detail) == ("broken", True)


def test_compiled_plugins_are_listed(folder: Path) -> None:
    install(folder, Case(source=None, value="lora_lite_evil.inner"))
    (folder / "lora_lite_evil").mkdir()
    (folder / "lora_lite_evil/inner.pyc").write_bytes(b"\0")
    (info,) = ll.list_variants("evil")
    assert (info.state, info.summary) == ("ok", "")


def test_much_source_of_one_package_is_not_read(folder: Path) -> None:
    names = [f"v{i}" for i in range(9)]
    for name in names:
        (folder / f"{name}.py").write_text(f'"""{"d" * 100_000}"""', encoding="utf-8")
    install(folder, Case(points="[lora_lite.variants]\n" + "".join(f"{name} = {name}\n" for name in names)))
    rows = ll.list_variants("v*")
    assert [info.state for info in rows] == ["ok"] * 6 + ["broken"] * 3
    assert "more than 524,288 bytes of source" in rows[-1].detail


def test_a_finder_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[object]:
        yield from ()
        raise ValueError("\x1b[2J")

    monkeypatch.setattr(packages, "distributions", broken)
    (info,) = ll.list_variants()
    assert info.detail == "installed packages cannot be listed to the end: ValueError: \\x1b[2J"


def test_commands_of_strangers(folder: Path) -> None:
    lines = {"sick": "sys:exit", "exit": "lora_lite_evil:x", "text": "json:dumps", "colon": "a:b:c", "variants": "json:dumps", hostile.ESCAPES: "json", "none": ""}  # fmt: skip
    points = "[lora_lite.commands]\n" + "".join(f"{name} = {value}\n" for name, value in lines.items())
    install(folder, Case(source="raise SystemExit(3)", points=points + "nothing\n"))
    done = CliRunner().invoke(cli.main, ["--help"])
    assert done.exit_code == 0
    assert safe(done.output)
    assert done.output.count("(broken: cannot be imported)") == 7
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
    assert isinstance(cli.main.get_command(click.Context(cli.main), "sick"), click.Command)


# --- names that several claim ------------------------------------------------------------------------------------


def test_a_stranger_that_claims_a_first_party_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(folder, "Evil_Pkg", "lora")
    with pytest.raises(ll.AmbiguousVariant) as caught:
        ll.get_variant("lora")
    assert "uninstall one of them, or set LORA_LITE_BLOCK=Evil_Pkg " in str(caught.value)
    assert str(caught.value).endswith("(or LORA_LITE_PLUGINS=lora-lite-lora, which allows that package alone)")
    assert {info.state for info in ll.list_variants("lora")} == {"claimed twice"}
    for switch, value in (
        ("LORA_LITE_BLOCK", "evil-pkg"),
        ("LORA_LITE_BLOCK", " , EVIL.pkg"),
        ("LORA_LITE_PLUGINS", "lora-lite-lora"),
        ("LORA_LITE_PLUGINS", "Lora_Lite.lora"),
        ("LORA_LITE_PLUGINS", "lora"),
        ("LORA_LITE_PLUGINS", "lora,evil-pkg"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(registry, "_loaded", {})
            patch.setenv(switch, value)
            assert ll.get_variant("lora").distribution == "lora-lite-lora", value
            assert ll.LoRAConfig.variant == "lora"
            states = {info.distribution: info.state for info in ll.list_variants("lora")}
            assert states == {"lora-lite-lora": "ok", "Evil_Pkg": "blocked"}, value
    monkeypatch.setenv("LORA_LITE_PLUGINS", "evil-pkg,lora-lite-lora")
    with pytest.raises(ll.AmbiguousVariant):
        ll.get_variant("lora")


def test_a_name_of_nobody_in_particular(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pkg-one", "pkg-two", "pkg-three"):
        package(folder, name, "twin")
    monkeypatch.setenv("LORA_LITE_BLOCK", "pkg-three")
    with pytest.raises(ll.AmbiguousVariant) as caught:
        ll.get_variant("twin")
    switch = str(caught.value).partition("LORA_LITE_BLOCK=")[2].partition(" ")[0]
    assert switch in ("pkg-three,pkg-two", "pkg-three,pkg-one")
    monkeypatch.setenv("LORA_LITE_BLOCK", switch)
    assert ll.get_variant("twin").distribution in ("pkg-one", "pkg-two")
    monkeypatch.setenv("LORA_LITE_PLUGINS", "twin")
    assert ll.get_variant("twin")
    monkeypatch.delenv("LORA_LITE_BLOCK")
    monkeypatch.setattr(registry, "_loaded", {})
    with pytest.raises(ll.AmbiguousVariant):
        ll.get_variant("twin")
    monkeypatch.setenv("LORA_LITE_PLUGINS", "twin,pkg-two")
    assert ll.get_variant("twin").distribution == "pkg-two"


def test_a_broken_claim_takes_no_name(folder: Path) -> None:
    install(folder, Case(name="lora", metadata=None))
    assert ll.get_variant("lora").distribution == "lora-lite-lora"
    assert sorted(info.state for info in ll.list_variants("lora")) == ["broken", "ok"]


def test_a_name_that_is_spelled_like_a_config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(folder, "evil-pkg", "lo_ra")
    with pytest.raises(ll.AmbiguousVariant, match="LoRAConfig could mean lo_ra, lora"):
        ll.LoRAConfig  # noqa: B018
    monkeypatch.setenv("LORA_LITE_BLOCK", "evil-pkg")
    assert ll.LoRAConfig.variant == "lora"
    with pytest.raises(ll.MissingPlugin, match="is blocked by LORA_LITE_BLOCK=evil-pkg"):
        registry.variant_of_file("a", "lo_ra", {"distribution": "evil-pkg"})


@pytest.mark.parametrize("name", ["", "a b", "\x1b[2J", "l\u043era", "x" * 101, "a.b", "../a", 5, None])
def test_names_that_are_not_registered(name: object, toy: object) -> None:
    with pytest.raises(ll.BrokenPlugin, match="cannot be the name of a variant"):
        ll.register(toy, name=name)  # type: ignore[arg-type]
    with pytest.raises(ll.UnknownVariant) as caught:
        ll.get_variant(name)  # type: ignore[arg-type]
    assert safe(str(caught.value))
