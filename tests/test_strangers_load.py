"""Hostile files and paths through `ll.load` and `ll.save`: a typed error at once, and the model and the folder as before."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_lite as ll

from . import hostile_files
from .hostile_files import LAYER, VALID, WRONG, at_once, safe
from .make_golden import GOLDEN
from .models import net, snapshot

FILES = hostile_files.files()
CONFIGS = hostile_files.configs()
# Files that are odd, but say of this model what can be done.
LOADED = {
    *(f"core_version is {name}" for name in ("text", "empty", "escape", "long")),
    *(f"plugin's {field} is {name}" for field in ("distribution", "version") for name in ("text", "empty", "escape", "long")),
    *(f"seed is {name}" for name in ("zero", "negative", "huge")),
    *(f"target's fingerprint is {name}" for name in ("null", "nothing", "huge list")),
    *(f"target's storage is {name}" for name in ("text", "empty")),
    "plugin is no keys",
    "data of others",
}  # fmt: skip


def refused(path: Any, model: Any = None, **options: Any) -> str:
    """What load says: "" when it accepts, else the error's text; then the model is as before."""
    model = net() if model is None else model
    before = snapshot(model)
    with at_once():
        try:
            ll.load(model, path, **options)
        except ll.LoraLiteError as error:
            message = str(error)
        else:
            return ""
    assert snapshot(model) == before
    assert safe(message), message[:500]
    return message


@pytest.mark.parametrize("case", FILES)
def test_a_hostile_file(case: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(FILES[case])
    message = refused(path)
    assert (message == "") is (case in LOADED), message


@pytest.mark.parametrize("case", CONFIGS)
def test_a_hostile_config(case: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(CONFIGS[case])
    refused(path)


@pytest.mark.parametrize("name", WRONG)
def test_a_hostile_fingerprint(name: str, tmp_path: Path) -> None:
    """Of a variant that assumes something of the base."""
    text = (GOLDEN / "pissa.safetensors").read_bytes()
    _, adapter, _ = hostile_files.parts(text)
    adapter["targets"][LAYER]["fingerprint"] = WRONG[name]
    (tmp_path / "a.safetensors").write_bytes(hostile_files.with_adapter(adapter, file=text))
    assert (refused(tmp_path / "a.safetensors") == "") is (name in ("null", "nothing"))
    adapter["targets"][LAYER]["fingerprint"] = [float("nan")] * 17
    (tmp_path / "a.safetensors").write_bytes(hostile_files.with_adapter(adapter, file=text))
    assert "was made on another base model" in refused(tmp_path / "a.safetensors")


def test_paths_that_are_loaded(tmp_path: Path) -> None:
    for case, path in hostile_files.places(tmp_path).items():
        message = refused(path)
        wanted = ("cannot be read: ", "is not a safetensors file", "holds no adapter: ")
        assert any(text in message for text in wanted), (case, message)


def test_paths_that_are_saved(tmp_path: Path) -> None:
    places = hostile_files.places(tmp_path)
    before = sorted(os.listdir(tmp_path))
    model = net()
    ll.attach(model, ll.LoRAConfig())
    inside = {
        case: path for case, path in places.items() if case not in ("dangling", "sparse", "missing", "escapes", "bytes")
    }
    for case, path in inside.items():
        with at_once(), pytest.raises(ll.LoraLiteError) as caught:
            ll.save(model, path)
        assert safe(str(caught.value)), case
    assert sorted(os.listdir(tmp_path)) == before
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ll.AdapterFileError, match="cannot be written: it is a directory"):
        ll.save(model, tmp_path / "folder.safetensors")


def test_a_file_that_is_replaced_while_it_is_loaded(tmp_path: Path) -> None:
    """What the header says and the tensors hold is of one file."""
    path, model = tmp_path / "a.safetensors", net()
    for number in (1, 2):
        adapter = ll.attach(model, ll.LoRAConfig(r=2, alpha=float(number), target_names="up_proj"))
        for parameter in adapter.parameters():
            parameter.data.fill_(number)
        adapter.save(tmp_path / f"{number}.safetensors")
        adapter.detach()
    texts = [(tmp_path / f"{number}.safetensors").read_bytes() for number in (1, 2)]
    path.write_bytes(texts[0])
    done = threading.Event()

    def replace() -> None:
        while not done.is_set():
            for text in texts:
                (tmp_path / "next").write_bytes(text)
                os.replace(tmp_path / "next", path)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(100):
            adapter = ll.load(model, path)
            assert {float(parameter.detach().mean()) for parameter in adapter.parameters()} == {adapter.cfg.alpha}
            adapter.detach()
    finally:
        done.set()
        thread.join()


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    model = net()
    adapter = ll.attach(model, ll.LoRAConfig(r=2, train_modules="lm_head"))
    files = set()
    for number in range(20):
        adapter.save(tmp_path / f"{number}.safetensors")
        files.add((tmp_path / f"{number}.safetensors").read_bytes())
    assert len(files) == 1


def test_a_name_of_the_longest_length(tmp_path: Path) -> None:
    model = net()
    path = tmp_path / ("a" * (255 - len(".safetensors")) + ".safetensors")
    ll.attach(model, ll.LoRAConfig(r=2)).save(path)
    ll.load(net(), path)
    assert os.listdir(tmp_path) == [path.name]


# --- what to install ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "plugin", "message"),
    [
        ("shiny", {"distribution": "lora-lite-shiny", "version": "1.2"}, "needs variant 'shiny' of lora-lite-shiny 1.2; type: pip install lora-lite-shiny"),
        ("shiny", {"distribution": "x --index-url https://evil.invalid"}, "needs variant 'shiny', and the file names no valid package that provides it: 'x --index-url https://evil.invalid'"),
        ("shiny", {"distribution": "-r evil.txt"}, "the file names no valid package that provides it: '-r evil.txt'"),
        ("shiny", {"distribution": "x\n  type: pip install evil"}, "the file names no valid package that provides it: 'x\\n  type: pip install evil'"),
        ("shiny", {"distribution": "x", "version": "1; type: pip install evil"}, "needs variant 'shiny' of x; type: pip install x"),
        ("shiny", {"distribution": "\u017fhiny"}, "the file names no valid package that provides it: 'ſhiny'"),
        ("shiny", {}, "needs variant 'shiny', which was registered by hand; register it first"),
        ("lora", {"distribution": "lora-lite-evil", "version": "1"}, "is blocked by LORA_LITE_BLOCK=lora"),
    ],
)  # fmt: skip
def test_the_hint(variant: str, plugin: dict[str, str], message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("LORA_LITE_BLOCK", "lora")
    _, adapter, _ = hostile_files.parts()
    (tmp_path / "a.safetensors").write_bytes(
        hostile_files.with_adapter({**adapter, "variant": variant, "plugin": plugin})
    )
    with pytest.raises(ll.MissingPlugin) as caught:
        ll.load(net(), tmp_path / "a.safetensors")
    assert str(caught.value).endswith(message)


def test_a_variant_that_has_a_home(tmp_path: Path, monkeypatch: Any) -> None:
    """A file cannot send anybody elsewhere for it."""
    from lora_lite_core.discovery import entry_points, registry

    monkeypatch.setattr(entry_points, "entries", lambda group: [])
    monkeypatch.setattr(registry, "_loaded", {})
    (tmp_path / "a.safetensors").write_bytes(
        hostile_files.with_field("plugin", value={"distribution": "lora-lite-evil", "version": "9"})
    )
    with pytest.raises(ll.MissingPlugin) as caught:
        ll.load(net(), tmp_path / "a.safetensors")
    assert str(caught.value).endswith("needs variant 'lora' of lora-lite-lora; type: pip install lora-lite-lora")


def test_a_valid_file_loads(tmp_path: Path) -> None:
    assert refused(VALID) == ""
    assert isinstance(ll.load(net(), VALID).cfg.alpha, float)
    assert torch.is_tensor(next(iter(ll.load(net(), VALID).parameters())))
