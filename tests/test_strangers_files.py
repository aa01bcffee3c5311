"""Any bytes as a file, any path: a typed error or a sound summary, at once, and nothing that a terminal would obey."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora_lite as ll
from lora_lite_core.contract.text import LINE, LINES, paragraphs, plain, table
from lora_lite_core.contract.untrusted_input import JSON_VALUES, parse_json, read_regular
from lora_lite_core.files.adapter_file import open_adapter
from lora_lite_core.files.tensor_file.reading import open_tensors
from lora_lite_core.files.tensor_file.writing import write_tensors

from . import hostile_files
from .hostile_files import VALID, at_once, safe

FILES = hostile_files.files()
CONFIGS = hostile_files.configs()
BOUNDED = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# What is odd, but no reason to refuse a file: texts that are only shown, empty fingerprints and configs.
ACCEPTED = {
    *(f"config is {name}" for name in ("no keys", "dict")),
    *(f"core_version is {name}" for name in ("text", "empty", "escape", "long")),
    *(f"plugin's {field} is {name}" for field in ("distribution", "version") for name in ("text", "empty", "escape", "long")),
    *(f"seed is {name}" for name in ("zero", "negative", "huge")),
    *(f"target's fingerprint is {name}" for name in ("null", "nothing", "huge list")),
    *(f"target's overrides is {name}" for name in ("no keys", "dict")),
    *(f"target's storage is {name}" for name in ("text", "empty")),
    "plugin is no keys",
    "targets is no keys",
    "variant is text",
    "data of others",
    "scalar",
}  # fmt: skip


def told(path: Any) -> str:
    """What inspect says: "" when it accepts, else the error's text."""
    refused: ll.LoraLiteError | None = None
    try:
        file = ll.inspect(path)
        text = str(file)
        json.loads(json.dumps(file.to_dict()))
    except ll.LoraLiteError as error:
        refused, text = error, str(error)
    assert safe(text), repr(text)[:500]
    assert len(repr(refused)) < 100_000
    return text if refused else ""


def test_the_table_is_long() -> None:
    assert len(FILES) + len(CONFIGS) > 600


@pytest.mark.parametrize("case", FILES)
def test_a_hostile_file(case: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(FILES[case])
    with at_once():
        message = told(path)
    assert (message == "") is (case in ACCEPTED), message
    assert not message or str(path) in message


def test_configs_are_shown_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for case, data in CONFIGS.items():
        path.write_bytes(data)
        with at_once():
            assert (told(path) == "") is not case.endswith("is deep"), case


def test_paths(tmp_path: Path) -> None:
    for case, path in hostile_files.places(tmp_path).items():
        with at_once():
            message = told(path)
        assert "cannot be read: " in message or "is not a safetensors file" in message, (case, message)


def test_what_stands_at_a_path_is_said(tmp_path: Path) -> None:
    places = hostile_files.places(tmp_path)
    told_of = {"pipe": "it is a named pipe", "folder": "it is a directory", "zeros": "it is a device", "missing": "No such file", "number": "not int", "nul": "embedded null byte"}  # fmt: skip
    for case, text in told_of.items():
        assert text in told(places[case]), case


def test_a_length_without_end_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as stream:
        stream.write((3 * 10**9).to_bytes(8, "little"))
        stream.truncate(2**40)
    tracemalloc.start()
    try:
        assert "is not a safetensors file" in told(path)
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_the_largest_header_takes_seconds_at_most(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    many = {f"layers.{i}.lora_A": entry for i in range(JSON_VALUES // 8)}
    path.write_bytes(hostile_files.with_header(lambda header: header.update(many)))
    with at_once(20):  # two, on a machine that does nothing else
        assert len(ll.inspect(path).tensors) > len(many)


@given(st.binary(max_size=300))
@BOUNDED
def test_random_bytes(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    assert told(tmp_path / "a")
    (tmp_path / "a").write_bytes(hostile_files.joined(data, data))
    assert told(tmp_path / "a")


@given(st.data())
@BOUNDED
def test_a_valid_file_with_random_changes(tmp_path: Path, data: st.DataObject) -> None:
    text = bytearray(VALID.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(text) - 1))
        text[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    (tmp_path / "a").write_bytes(text)
    told(tmp_path / "a")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.data(), VALUES)
@BOUNDED
def test_a_valid_header_with_a_random_value(tmp_path: Path, data: st.DataObject, value: Any) -> None:
    _, adapter, _ = hostile_files.parts()
    place: Any = adapter
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        place[key] = value
        break
    (tmp_path / "a").write_bytes(hostile_files.with_adapter(adapter))
    told(tmp_path / "a")


# --- what is read and written ------------------------------------------------------------------------------------


def test_tensors_are_those_of_safetensors(tmp_path: Path) -> None:
    kinds = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64]  # fmt: skip
    tensors = {f"{kind}": torch.arange(-3, 3).abs().to(kind).reshape(2, 3) for kind in kinds}
    tensors |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "é": torch.zeros(1)}
    save_file(tensors, tmp_path / "a", metadata={"b": "c"})
    write_tensors(tmp_path / "b", dict(reversed(tensors.items())), {"b": "c"})
    for path in (tmp_path / "a", tmp_path / "b"):
        with open_tensors(path) as file:
            ours, metadata = file.read(), file.metadata
        theirs = load_file(path)
        assert metadata == {"b": "c"} == safe_open(path, "pt").metadata()
        assert ours.keys() == theirs.keys() == tensors.keys()
        for name, tensor in tensors.items():
            for one in (ours[name], theirs[name]):
                assert (one.dtype, one.shape) == (tensor.dtype, tensor.shape)
                assert torch.equal(
                    one.view(torch.uint8) if one.ndim else one, tensor.view(torch.uint8) if one.ndim else tensor
                )
    assert (tmp_path / "a").stat().st_size == (tmp_path / "b").stat().st_size


def test_numbers_are_turned_round_on_a_machine_of_the_other_order(tmp_path: Path, monkeypatch: Any) -> None:
    save_file({"a": torch.tensor([1, 256]), "b": torch.tensor([1 + 2j])}, tmp_path / "a")
    monkeypatch.setattr("sys.byteorder", "big")
    with open_tensors(tmp_path / "a") as file:
        tensors = file.read()
    assert tensors["a"].tolist() == [2**56, 2**48]
    write_tensors(tmp_path / "b", tensors, {})
    monkeypatch.undo()
    assert load_file(tmp_path / "b")["b"].item() == 1 + 2j


def test_the_header_and_the_tensors_are_of_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(VALID.read_bytes())
    with open_adapter(path) as (file, opened):
        os.replace(path, tmp_path / "b")
        write_tensors(path, {"other": torch.zeros(1)}, {})
        assert opened.read().keys() == file.tensors.keys()
        with (tmp_path / "b").open("r+b") as stream:  # the same file, written in place
            stream.truncate(2000)
        with pytest.raises(ll.AdapterFileError, match="was changed while it was read; try again"):
            opened.read()


def test_reading_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 11)
    assert read_regular(tmp_path / "a", 11) == b"x" * 11
    assert read_regular(tmp_path / "a", 10, cut=True) == b"x" * 10
    with pytest.raises(OSError, match="it is larger than 10 bytes"):
        read_regular(tmp_path / "a", 10)
    with pytest.raises(ValueError, match="key 'a' stands twice"):
        parse_json('{"b": [{"a": 1, "a": 1}]}')


# --- texts -------------------------------------------------------------------------------------------------------


def test_messages_are_cut_and_escaped_and_keep_their_lines() -> None:
    error = ll.UnknownVariant("a\n  b → \x1b[2J\u202e" + "c" * 10**6 + "\n  type: pip install x")
    assert safe(str(error))
    assert str(error).startswith("a\n  b → \\x1b[2J\\u202eccc")
    assert str(error).endswith("\n  type: pip install x")
    assert str(ll.ConfigError(str(error))) == str(error)
    assert plain("Zoë \u200d 你好\t\n") == "Zoë \u200d 你好\\t\\n"
    assert len(plain("x" * 1000, 60)) <= 60
    lines = paragraphs(f"{'y' * 5000}\n" * 5000).split("\n")
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= LINE
    assert len(paragraphs("\n" * 10**6).split("\n")) == LINES
    assert len(table(("a", "b"), [("x" * 10**5, "\x1b")] * 2000).splitlines()) == 1003
