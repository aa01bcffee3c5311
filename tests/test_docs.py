"""Documentation is code: what README shows is run as printed."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import lora_lite as ll

from .models import net, token_ids, train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


@pytest.fixture
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_quickstart_and_what_else_there_is(in_a_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, quickstart, more, _, _ = blocks("python")
    exec(compile(first, "README, first lines", "exec"), {})
    (in_a_folder / "adapter.safetensors").unlink()
    names: dict[str, object] = {}
    exec(compile(quickstart, "README quickstart", "exec"), names)
    assert (in_a_folder / "adapter.safetensors").exists()
    exec(compile(more, "README, what else there is", "exec"), names)
    printed = capsys.readouterr().out
    assert "<Adapter 'default': pissa, r=8, 14 layers" in printed
    assert re.search(r"^style +lora +4–8 +\d+ +[\d,]+ +1\. +1$", printed, flags=re.M)
    assert re.search(r"^variant +package +state +summary$", printed, flags=re.M)


def test_the_variant_in_the_readme_works(registered, tmp_path: Path) -> None:
    module = types.ModuleType("lora_lite_gained")
    sys.modules["lora_lite_gained"] = module  # dataclasses looks its module up
    try:
        exec(compile(blocks("python")[3], "README variant", "exec"), vars(module))
        registered(module, name="gained")
        model = net()
        base = model(token_ids())
        adapter = ll.attach(model, ll.GainedConfig(r=2, spread=0.5))
        assert torch.equal(model(token_ids()), base)
        train(model, adapter)
        assert all(float(t.detach().abs().sum()) > 0 for _, t in adapter.named_tensors())
        trained = model(token_ids())
        adapter.save(tmp_path / "a.safetensors")
        fresh = net()
        ll.load(fresh, tmp_path / "a.safetensors")
        assert torch.equal(fresh(token_ids()), trained)
        exec(compile(blocks("python")[4], "README test", "exec"), vars(module))
        (mark,) = module.test_gained.pytestmark
        assert "identity_at_start" in [case.id for case in mark.args[1]]
        for case in mark.args[1]:
            module.test_gained(*case.values)
    finally:
        del sys.modules["lora_lite_gained"]


def test_every_hook_and_argument_is_documented() -> None:
    import inspect

    from lora_lite_core.contract import hookspecs
    from lora_lite_core.contract.variant import HOOKS

    page = (ROOT / "docs/hooks.md").read_text(encoding="utf-8")
    listed = re.search(r"^## The arguments\n\n```text\n(.*?)^```", page, flags=re.M | re.S)
    assert listed
    explained = {name for line in listed[1].splitlines() for name in re.split(r"  +", line)[0].split(", ")}
    used: set[str] = set()
    for name in HOOKS:
        arguments = list(inspect.signature(getattr(hookspecs, name)).parameters)
        used.update(arguments)
        assert f"## {name}\n\n`{name}({', '.join(arguments)})`\n\n" in page
        assert len(getattr(hookspecs, name).__doc__) > 40
    assert explained == used


def test_every_public_name_is_documented() -> None:
    page = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    for name in ll.__all__:
        if callable(getattr(ll, name)):
            assert f"\n### {name}\n" in page
            assert len(getattr(ll, name).__doc__ or "") > 30, name
    undocumented = re.findall(r"^(\.\w+.*)\n\n", page, flags=re.M)
    assert not undocumented


def test_the_named_inits_are_in_the_text_of_paramspec() -> None:
    from lora_lite_core.contract.param_spec import NAMED_INITS

    assert all(f'"{name}"' in (ll.ParamSpec.__doc__ or "") for name in NAMED_INITS)


def test_the_package_table_is_what_the_packages_provide() -> None:
    rows = dict(re.findall(r"^\| `(lora-lite-\w+)` \| (.*) \|$", README, flags=re.M))
    provided: dict[str, list[str]] = {}
    for info in ll.list_variants():
        provided.setdefault(info.distribution, []).append(f"`{info.name}`")
    for package, names in provided.items():
        assert rows[package] == ", ".join(names)


COMMANDS = re.findall(r"`(lora-lite (?:variants|inspect|check (?!gained))[^`]*)`", README)


@pytest.mark.parametrize(
    "command", [pytest.param(one, marks=[pytest.mark.slow] if "check" in one else []) for one in COMMANDS]
)
def test_commands_in_the_readme(command: str, in_a_folder: Path) -> None:
    if "VARIANT" in command:
        command = command.replace("VARIANT", "ia3")
    if ".safetensors" in command:
        ll.attach(net(), ll.LoRAConfig()).save("adapter.safetensors")
    command = command.replace("lora-lite", f"{sys.executable} -m lora_lite_core", 1)
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_newcomer_is_told_why_the_lock_has_changed() -> None:
    commands = README.partition("## Two commands\n")[2].partition("\n## ")[0]
    assert "`M uv.lock`" in commands
    assert "CONTRIBUTING.md#the-lock-file" in commands


def test_links_point_to_files() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{target} in {page}"


def test_the_example_readme_shows_its_row() -> None:
    import ast

    example = ROOT / "examples/lora-lite-scale"
    docstring = ast.get_docstring(ast.parse((example / "lora_lite_scale/__init__.py").read_text(encoding="utf-8")))
    assert f"scale    lora-lite-scale 0.3.0  ok     {docstring}" in (example / "README.md").read_text(encoding="utf-8")


def _tables(page: str) -> list[list[list[str]]]:
    """Its Markdown tables as rows of cells, the line under the heads left out."""
    found = re.findall(r"(?:^\|.*\|\n)+", page, flags=re.M)
    rows = [[[c.strip() for c in line.strip("|").split("|")] for line in one.strip().splitlines()] for one in found]
    return [[table[0], *table[2:]] for table in rows]


def test_the_performance_page_shows_the_tables_that_its_commands_print() -> None:
    import shlex

    from lora_lite_bench.speed import tables
    from lora_lite_bench.speed.command import speed
    from lora_lite_bench.speed.contestants import Settings, cases

    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    lora-lite speed (.+)$", page, flags=re.M)
    asked = [speed.make_context("speed", shlex.split(command)).params for command in commands]
    assert {part for one in asked for part in one["parts"]} == {"model", "layers", "growth", "starts", "imports"}
    heads = [tuple(table[0]) for table in _tables(page)]
    assert heads[0] == tables.HEADS
    assert {tables.LYCORIS_HEADS, tables.GROWTH_HEADS, tables.INIT_HEADS, tables.IMPORT_HEADS} <= {*heads}
    labels = [case.label for case in cases([*asked[0]["variants"]], Settings())]
    assert [row[0] for row in _tables(page)[0][1:]] == ["frozen", *labels]
    every = {info.name for info in ll.list_variants()}
    whole = max(_tables(page), key=len)
    assert every - {row[0] for row in whole} <= {"antipasto", *_without_a_layer()}, "each variant's costs are told"


def _without_a_layer() -> set[str]:
    """The variants that a single linear layer, without settings, does not carry."""
    from lora_lite_bench.command import variant_names

    return {info.name for info in ll.list_variants()} - {*variant_names((), True)}


@pytest.mark.parametrize("name", ["README.md", "docs/index.md"])
def test_the_small_table_quotes_the_performance_page(name: str) -> None:
    heads, *rows = _tables((ROOT / "docs/performance.md").read_text(encoding="utf-8"))[0]
    places = [heads.index("step ms") + 1, heads.index("token ms") + 1, heads.index("attach ms") + 1, len(heads) - 1]
    known = {row[0]: [row[place] for place in places] for row in rows}
    small = [table for table in _tables((ROOT / name).read_text(encoding="utf-8")) if "training step" in table[0]]
    assert len(small) == 1
    for method, *numbers in small[0][1:]:
        assert numbers == known[method.lower()], method


@pytest.mark.slow
def test_pages_made_from_the_code_are_current() -> None:
    """In a process of its own: click remembers how a command was first asked for its help."""
    made = [sys.executable, str(ROOT / "tools/make_docs.py"), "--check"]
    done = subprocess.run(made, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_variant_is_chosen_for_something() -> None:
    page = (ROOT / "docs/variants.md").read_text(encoding="utf-8")
    assert {info.name for info in ll.list_variants()} <= {*re.findall(r"`(\w+)`", page)}


def test_every_method_of_peft_has_a_row() -> None:
    """A new one in PEFT shows here. Where a variant is named, it reads that method's folders."""
    import peft

    page = (ROOT / "docs/from-peft.md").read_text(encoding="utf-8").partition("## Every method of PEFT")[2]
    rows = re.findall(r"^\| (`[A-Z0-9_`, ]+`) \| (?:`(\w+)`)? ?\|", page.partition("\n## ")[0], flags=re.M)
    told = {kind: variant for kinds, variant in rows for kind in re.findall(r"`(\w+)`", kinds)}
    here = {kind.value for kind in peft.PeftType}
    assert here <= {*told}, here - {*told}
    for kind, variant in told.items():
        assert not variant or ll.get_variant(variant).from_peft is not None, kind


def test_what_peft_users_are_told() -> None:
    page = (ROOT / "docs/from-peft.md").read_text(encoding="utf-8")
    for name in re.findall(r"`?ll\.(\w+)", page):
        assert hasattr(ll, name), name
    calls = re.findall(r"`(ll\.\w+Config\([^`]*\))`", page)
    assert len(calls) >= 2
    for call in calls:
        eval(call, {"ll": ll})
