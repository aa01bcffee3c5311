"""Discovery: the listing, its states, the environment switches, and what a wrong installation gets."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lora_lite as ll
from lora_lite_core.discovery import entry_points, registry

FIRST_PARTY = sorted(registry.FIRST_PARTY)
CONFIGS = [
    "AntiPaSTOConfig",
    "DeLoRAConfig",
    "DoRAConfig",
    "EVAConfig",
    "HRAConfig",
    "IA3Config",
    "IA3FFConfig",
    "LoRAConfig",
    "LoRAXSConfig",
    "OFTConfig",
    "PiSSAConfig",
    "RoAdConfig",
    "SSVDConfig",
    "TrainableTokensConfig",
]
GOOD = '''"""{title}: a test variant.

More text.
"""
import lora_lite_core as core


class Config(core.AdapterConfig):
    variant = "{name}"


@core.hookimpl
def param_specs(d_out):
    return {{"lora_h": core.ParamSpec((d_out,))}}


@core.hookimpl
def forward(y, params):
    return y + params["lora_h"].to(y.dtype)
'''

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """install(distribution, variant, source): a package on sys.path, as pip would leave it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_loaded", {})

    def make(distribution: str, variant: str, source: str | None = None, module: str = "") -> None:
        module = module or distribution.replace("-", "_")
        if source is not None:
            (tmp_path / f"{module}.py").write_text(source, encoding="utf-8")
        info = tmp_path / f"{distribution.replace('-', '_')}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n", encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[lora_lite.variants]\n{variant} = {module}\n", encoding="utf-8")

    yield make
    for name in [name for name, module in sys.modules.items() if str(tmp_path) in str(getattr(module, "__file__", ""))]:
        from lora_lite_core.contract.variant_validation import forget

        forget(sys.modules.pop(name))


def test_first_party() -> None:
    listed = ll.list_variants()
    assert [info.name for info in listed] == FIRST_PARTY
    assert "pissa" in listed
    assert "pisa" not in listed
    pissa = next(info for info in listed if info.name == "pissa")
    assert (pissa.distribution, pissa.state) == ("lora-lite-svd", "ok")
    assert pissa.summary == "PiSSA: LoRA that starts from the principal singular triplets of the weight."
    assert pissa.config == "PiSSAConfig"
    lines = repr(listed).splitlines()
    assert lines[0].split() == ["variant", "package", "state", "summary"]
    assert any(line.startswith("pissa ") and " lora-lite-svd 0.1.0 " in line for line in lines)
    assert all(info.state == "ok" for info in ll.list_variants(check=True))


def test_pattern() -> None:
    assert [info.name for info in ll.list_variants("ia3*")] == ["ia3", "ia3_ff"]
    assert repr(ll.list_variants("nothing*")).startswith("no variants match")


def test_the_listing_in_a_notebook() -> None:
    from xml.etree import ElementTree

    page = ElementTree.fromstring(f"<div>{ll.list_variants()._repr_html_()}</div>")
    rows = [["".join(cell.itertext()) for cell in row] for row in page.iter("tr")]
    assert rows[0] == ["variant", "package", "state", "summary"]
    assert [row[0] for row in rows[1:]] == FIRST_PARTY
    assert all(row[2] == "ok" and row[3] for row in rows[1:])
    assert ll.list_variants("nothing*")._repr_html_().startswith("<p>no variants match")


def test_a_plugin_for_another_core_is_refused_before_it_is_imported(install: Install, tmp_path: Path) -> None:
    install("lora-lite-later", "later", "raise SystemError('imported')")
    metadata = tmp_path / "lora_lite_later-1.5.dist-info/METADATA"
    text = metadata.read_text(encoding="utf-8")
    metadata.write_text(text + "Requires-Dist: torch\nRequires-Dist: lora_lite_core (>=7.0,<7.1)\n", encoding="utf-8")
    with pytest.raises(ll.BrokenPlugin) as caught:
        ll.get_variant("later")
    assert str(caught.value) == (
        "variant 'later' of lora-lite-later 1.5 needs lora-lite-core<7.1,>=7.0, and 0.1.0 is installed; "
        "type: pip install --upgrade lora-lite-core lora-lite-later"
    )
    (info,) = ll.list_variants("later", check=True)
    assert info.state == "broken"


def test_requirements_that_are_none_of_the_cores_business(install: Install, tmp_path: Path) -> None:
    install("lora-lite-fits", "fits", GOOD.format(title="Fits", name="fits"))
    metadata = tmp_path / "lora_lite_fits-1.5.dist-info/METADATA"
    lines = [
        "lora-lite-core>=0.1,<0.2",
        "lora-lite-core-tools>=9",
        "lora-lite-core>=9; extra == 'later'",
        "not a ~~ one",
    ]
    text = metadata.read_text(encoding="utf-8") + "".join(f"Requires-Dist: {line}\n" for line in lines)
    metadata.write_text(text, encoding="utf-8")
    assert ll.get_variant("fits").version == "1.5"


def test_a_new_package_is_listed_and_works(install: Install) -> None:
    install("lora-lite-fresh", "fresh", GOOD.format(title="Fresh", name="fresh"))
    info = ll.list_variants("fresh")[0]
    assert (info.distribution, info.version, info.state, info.summary) == (
        "lora-lite-fresh",
        "1.5",
        "ok",
        "Fresh: a test variant.",
    )
    assert "lora_lite_fresh" not in sys.modules, "listing must not import"
    assert ll.FreshConfig is ll.get_variant("fresh").Config
    assert ll.get_variant("fresh").distribution == "lora-lite-fresh"


def test_claimed_twice(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("pkg-one", "twin", GOOD.format(title="One", name="twin"))
    install("pkg-two", "twin", GOOD.format(title="Two", name="twin"))
    assert [info.state for info in ll.list_variants("twin")] == ["claimed twice"] * 2
    with pytest.raises(ll.AmbiguousVariant) as caught:
        ll.get_variant("twin")
    assert "variant 'twin' is claimed by pkg-" in str(caught.value)
    assert "pkg-one 1.5" in str(caught.value)
    assert "pkg-two 1.5" in str(caught.value)
    assert "uninstall one of them, or set LORA_LITE_BLOCK=pkg-" in str(caught.value)
    monkeypatch.setenv("LORA_LITE_BLOCK", "pkg-two")
    assert ll.get_variant("twin").distribution == "pkg-one"


def test_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_LITE_BLOCK", "pissa, lora-lite-ortho")
    states = {info.name: info.state for info in ll.list_variants()}
    assert [states[name] for name in ("ia3", "ia3_ff", "lora", "pissa")] == ["blocked", "blocked", "ok", "blocked"]
    with pytest.raises(
        ll.UnknownVariant, match="variant 'pissa' of lora-lite-svd is blocked by LORA_LITE_BLOCK=pissa, lora-lite-ortho"
    ):
        ll.get_variant("pissa")
    monkeypatch.delenv("LORA_LITE_BLOCK")
    monkeypatch.setenv("LORA_LITE_PLUGINS", "lora-lite-lora,ia3")
    ok = {info.name for info in ll.list_variants() if info.state == "ok"}
    assert ok == {"ia3", *(name for name, package in registry.FIRST_PARTY.items() if package == "lora-lite-lora")}


def test_plugin_whose_import_fails(install: Install) -> None:
    install("lora-lite-sick", "sick", '"""Sick."""\nimport surely_not_there\n')
    assert ll.list_variants("sick")[0].state == "ok", "nothing is imported before it is asked for"
    checked = ll.list_variants("sick", check=True)[0]
    assert checked.state == "broken"
    with pytest.raises(ll.BrokenPlugin) as caught:
        ll.get_variant("sick")
    assert (
        str(caught.value)
        == checked.detail
        == (
            "variant 'sick' of lora-lite-sick 1.5 cannot be imported: ModuleNotFoundError: No module named 'surely_not_there'\n"
            "  its entry point says lora_lite_sick; try: pip install --upgrade lora-lite-sick"
        )
    )
    assert "lora" in ll.list_variants(), "the others are not affected"


def test_plugin_without_source_or_with_a_syntax_error(install: Install) -> None:
    install("lora-lite-gone", "gone")
    install("lora-lite-typo", "typo", "def broken(:\n")
    states = {info.name: (info.state, info.detail) for info in ll.list_variants()}
    assert states["gone"] == ("broken", "module lora_lite_gone has no source file")
    assert states["typo"][0] == "broken"
    assert "gone: module lora_lite_gone has no source file" in repr(ll.list_variants())


def test_entry_point_that_differs_from_the_config(install: Install) -> None:
    install("lora-lite-odd", "odd", GOOD.format(title="Odd", name="even"))
    with pytest.raises(
        ll.BrokenPlugin, match="Config.variant is 'even'; write `variant = 'odd'`, as the entry point says"
    ):
        ll.get_variant("odd")


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(ll.UnknownVariant) as caught:
        ll.get_variant("pisa")
    assert (
        str(caught.value)
        == f"no variant is called 'pisa'; did you mean 'pissa'?\n  installed: {', '.join(FIRST_PARTY[:40])} and {len(FIRST_PARTY) - 40} more\n"
        "  one of your own: pip install its package (pip install -e FOLDER), or ll.register(module, name=…)"
    )
    with pytest.raises(ll.MissingPlugin) as missing:
        ll.PisaConfig  # noqa: B018
    assert type(caught.value) is ll.UnknownVariant
    assert str(missing.value).startswith("no variant is called 'pisa'; did you mean 'pissa'?")
    assert not hasattr(ll, "PisaConfig")
    with pytest.raises(AttributeError, match="module 'lora_lite' has no attribute 'atach'"):
        ll.atach  # noqa: B018


def test_missing_first_party_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry_points, "entries", lambda group: [])
    monkeypatch.setattr(registry, "_loaded", {})
    with pytest.raises(AttributeError) as caught:
        ll.LoRAConfig  # noqa: B018
    assert str(caught.value) == "variant 'lora' is in a package that is not installed; type: pip install lora-lite-lora"
    assert isinstance(caught.value, ll.MissingPlugin)
    with pytest.raises(ll.MissingPlugin, match="pip install lora-lite-svd"):
        ll.LoraLiteConfig(variant="pissa")
    assert "pip install lora-lite" in repr(ll.list_variants())


def test_the_hint_table_names_what_the_packages_provide() -> None:
    assert {info.name: info.distribution for info in ll.list_variants()} == registry.FIRST_PARTY


def test_ambiguous_config_name(registered: Any, toy: SimpleNamespace) -> None:
    class Config(ll.AdapterConfig):
        variant = "ia3ff"

    toy.Config = Config
    registered(toy, name="ia3ff")
    with pytest.raises(
        ll.AmbiguousVariant, match=r"IA3FFConfig could mean ia3_ff, ia3ff; use get_variant\(name\).Config"
    ):
        ll.IA3FFConfig  # noqa: B018


def test_first_party_configs_are_attributes() -> None:
    for name in CONFIGS:
        assert name in dir(ll)
        assert getattr(ll, name).__name__ == name
    assert {getattr(ll, name).variant for name in CONFIGS} <= {*FIRST_PARTY}
    by_variant = {
        getattr(ll, name).variant
        for name in dir(ll)
        if isinstance(getattr(ll, name), type) and hasattr(getattr(ll, name), "variant")
    }
    assert {*FIRST_PARTY} <= by_variant
    assert {"attach", "load"} <= set(dir(ll))
