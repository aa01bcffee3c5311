"""Names that several packages claim, and names that look like others: who is meant, and the ways out."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

import lora_lite as ll
from lora_lite_core.cli import commands as cli
from lora_lite_core.discovery import registry

from .hostile_files import safe
from .hostile_packages import Case, install, package


def test_a_stranger_that_claims_a_first_party_name(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(site, "Evil_Pkg", "lora")
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


def test_what_looks_like_an_allowed_name(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another spelling of a variant's name, and a package that is called like a variant."""
    package(site, "evil-pkg", "LoRA")
    package(site, "pissa", "evil")
    monkeypatch.setenv("LORA_LITE_PLUGINS", "lora,pissa")
    assert {info.name for info in ll.list_variants() if info.state == "ok"} == {"lora", "pissa"}
    monkeypatch.setenv("LORA_LITE_PLUGINS", "lora,evil-pkg")
    assert {info.name for info in ll.list_variants() if info.state == "ok"} == {"lora", "LoRA"}


def test_a_name_of_nobody_in_particular(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pkg-one", "pkg-two", "pkg-three"):
        package(site, name, "twin")
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


def test_a_broken_claim_takes_no_name(site: Path) -> None:
    install(site, Case(name="lora", metadata=None))
    assert ll.get_variant("lora").distribution == "lora-lite-lora"
    assert sorted(info.state for info in ll.list_variants("lora")) == ["broken", "ok"]


def test_a_name_that_is_spelled_like_a_config(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(site, "evil-pkg", "lo_ra")
    with pytest.raises(ll.AmbiguousVariant, match="LoRAConfig could mean lo_ra, lora"):
        ll.LoRAConfig  # noqa: B018
    monkeypatch.setenv("LORA_LITE_BLOCK", "evil-pkg")
    assert ll.LoRAConfig.variant == "lora"
    with pytest.raises(ll.MissingPlugin, match="is blocked by LORA_LITE_BLOCK=evil-pkg"):
        registry.variant_of_file("a", "lo_ra", {"distribution": "evil-pkg"})


@pytest.mark.parametrize("name", ["a b", "\x1b[2J", "l\u043era", "x" * 101, "a.b", "../a", 5])
def test_names_that_are_not_registered(name: object, toy: object) -> None:
    with pytest.raises(ll.BrokenPlugin, match="cannot be the name of a variant"):
        ll.register(toy, name=name)  # type: ignore[arg-type]
    with pytest.raises(ll.UnknownVariant) as caught:
        ll.get_variant(name)  # type: ignore[arg-type]
    assert safe(str(caught.value))


def test_a_stranger_that_claims_a_command(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(
        site, Case(source="raise SystemError('imported')", points="[lora_lite.commands]\nbench = lora_lite_evil:x\n")
    )
    twice = CliRunner().invoke(cli.main, ["bench"])
    assert twice.exit_code == 1
    assert "command 'bench' is claimed by lora-lite-" in twice.output
    assert "or set LORA_LITE_BLOCK=lora-lite-evil (or LORA_LITE_PLUGINS=lora-lite-bench, which" in twice.output
    for switch, value in (("LORA_LITE_BLOCK", "Lora_Lite.Evil"), ("LORA_LITE_PLUGINS", "lora"), ("LORA_LITE_PLUGINS", "lora-lite-bench")):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setenv(switch, value)
            done = CliRunner().invoke(cli.main, ["bench", "--help"])
            assert done.output.startswith("Usage: main bench [OPTIONS] [VARIANT|FILE.py]"), value
    monkeypatch.setenv("LORA_LITE_BLOCK", "lora-lite-evil,lora-lite-bench")
    done = CliRunner().invoke(cli.main, ["bench"])
    assert "is blocked by LORA_LITE_BLOCK=lora-lite-evil,lora-lite-bench" in done.output
    assert "(blocked)" in CliRunner().invoke(cli.main, ["--help"]).output
