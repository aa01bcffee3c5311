"""Files that appear whole or not at all: what is in the way is said, and what a killed process left is removed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lora_lite as ll
from lora_lite_core.files.tensor_file import writing as safetensors_writing
from lora_lite_core.files.tensor_file.writing import write_tensors, write_whole

from . import hostile_files
from .hostile_files import at_once, safe

TENSORS = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.ones(3, dtype=torch.bfloat16), "c": torch.tensor([True])}
POSIX = pytest.mark.skipif(safetensors_writing.fcntl is None, reason="no file locks here")


def refusal(path: Any, parts: Any = (b"new",)) -> str:
    with at_once(), pytest.raises(ll.AdapterFileError) as caught:
        write_whole(path, parts)
    assert safe(str(caught.value))
    return str(caught.value)


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    metadata = {"z": "1", "a": "é", "m": '"\\n'}
    files = set()
    for number in range(20):
        names = list(TENSORS)[number % 3 :] + list(TENSORS)[: number % 3]
        texts = dict(list(metadata.items())[number % 3 :] + list(metadata.items())[: number % 3])
        write_tensors(tmp_path / str(number), {name: TENSORS[name].clone() for name in names}, texts)
        files.add((tmp_path / str(number)).read_bytes())
    (only,) = files
    assert int.from_bytes(only[:8], "little") % 8 == 0
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in load_file(tmp_path / "0").items())


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (torch.zeros(2, device="meta"), "a is on meta, without values, which no file holds"),
        (torch.zeros(2, dtype=torch.complex128), "a is a torch.strided tensor of torch.complex128"),
        (torch.eye(3).to_sparse(), "a is a torch.sparse_coo tensor of torch.float32"),
    ],
)
def test_tensors_that_no_file_holds(tensor: Tensor, what: str, tmp_path: Path) -> None:
    with pytest.raises(ll.AdapterFileError, match=what):
        write_tensors(tmp_path / "x", {"a": tensor}, {})
    with pytest.raises(ll.AdapterFileError, match="a name that is no text"):
        write_tensors(tmp_path / "x", {"\ud800": torch.zeros(1)}, {})
    assert list(tmp_path.iterdir()) == []


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    places = hostile_files.places(tmp_path)
    before = sorted(os.listdir(tmp_path))
    for case in ("pipe", "socket", "loop", "folder", "zero", "null", "nul", "long name", "long path", "surrogate", "under a file", "number", "none", "list", "object"):  # fmt: skip
        message = refusal(places[case])
        assert "cannot be written: " in message or "does not exist; make it first" in message, (case, message)
    assert "it is a directory" in refusal(tmp_path)
    assert "it is a link to itself" in refusal(places["loop"])
    assert "nowhere does not exist; make it first" in refusal(tmp_path / "nowhere" / "a")
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(
        safetensors_writing, "_temporary", lambda target, _: (target.with_name("t"), os.open("/dev/full", os.O_RDWR))
    )
    assert "cannot be written: No space left on device" in refusal(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"old"


def test_an_error_halfway_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")

    def parts() -> Iterator[bytes]:
        yield b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a", parts())
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_link_stays_a_link_and_any_name_of_a_file_will_do(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/a")
    write_whole(tmp_path / "link", [b"new"])
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder/a").read_bytes() == b"new"
    assert os.listdir(tmp_path / "folder") == ["a"]
    write_whole(str(tmp_path / ("n" * 255)), [b"new", bytearray(b"er"), memoryview(b"!")])
    assert (tmp_path / ("n" * 255)).read_bytes() == b"newer!"
    (tmp_path / "ordinary").touch()
    assert (tmp_path / "ordinary").stat().st_mode == (tmp_path / "link").stat().st_mode


# --- leftovers ---------------------------------------------------------------------------------------------------

WAITING = """
import sys, time
from lora_lite_core.files.tensor_file.writing import write_whole

def parts():
    yield b"half"
    print("half", flush=True)
    sys.stdin.read()
    yield b" and half"

write_whole(sys.argv[1], parts())
"""


def waiting(path: Path) -> subprocess.Popen[str]:
    """A process that has written half of the file."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "half\n"
    return process


@POSIX
def test_what_a_killed_process_left_is_removed_at_the_next_save(tmp_path: Path) -> None:
    for process in [waiting(tmp_path / name) for name in ("a", "a", "b")]:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    kept = {".a.other.tmp", ".a.b.01234567.tmp", ".a.01234567.tmp.txt", "a.01234567.tmp", ".ab.01234567.tmp"}
    for name in (*kept, ".a.zz_9x0q1.tmp"):
        (tmp_path / name).touch()
    (tmp_path / ".a.01234567.tmp").mkdir()
    assert len(os.listdir(tmp_path)) == 3 + len(kept) + 2
    write_whole(tmp_path / "a", [b"new"])
    (of_b,) = set(os.listdir(tmp_path)) - {"a", ".a.01234567.tmp", *kept}
    assert of_b.startswith(".b.")
    long = tmp_path / ("n" * 255)
    process = waiting(long)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    write_whole(long, [b"new"])
    assert len(os.listdir(tmp_path)) == 1 + 1 + len(kept) + 2


@POSIX
def test_a_process_at_work_keeps_its_file(tmp_path: Path) -> None:
    process = waiting(tmp_path / "a")
    write_whole(tmp_path / "a", [b"ours"])
    assert (tmp_path / "a").read_bytes() == b"ours"
    process.communicate("")
    assert process.returncode == 0
    assert (tmp_path / "a").read_bytes() == b"half and half"
    assert os.listdir(tmp_path) == ["a"]


def test_threads_that_save_to_one_path(tmp_path: Path) -> None:
    errors: list[Exception] = []

    def save(text: bytes) -> None:
        try:
            for _ in range(20):
                write_whole(tmp_path / "a", [text] * 10)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(letter,)) for letter in (b"x", b"y", b"z", b"w")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(set((tmp_path / "a").read_bytes())) == 1
    assert os.listdir(tmp_path) == ["a"]
