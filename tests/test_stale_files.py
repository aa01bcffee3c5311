"""What a process that was killed while it saved has left behind is cleaned up by the next save of the same file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_lite as ll

from .threads import Thread

TARGET = "adapter.safetensors"
KILLED = """
import os, signal, sys, torch
import lora_lite as ll
torch.manual_seed(1)
model = torch.nn.Sequential(torch.nn.Linear(8, 8))
ll.attach(model, ll.LoRAConfig(r=2))
ll.save(model, sys.argv[1])
{module} = __import__({module!r})
{module}.{function} = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
ll.save(model, sys.argv[1])
"""


def adapted(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 8))
    ll.attach(model, ll.LoRAConfig(r=2), seed=seed)
    return model


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("target", [TARGET, "a.safetensors", "[ab].safetensors", "ünter.v2.safetensors"])
def test_temporary_files_of_the_same_target_go(target: str, tmp_path: Path) -> None:
    path = tmp_path / target
    ours = [tmp_path / f".{target}.{middle}.tmp" for middle in ("abcd1234", "zz_9x0q1", "00000000")]
    kept = {
        ".other.safetensors.abcd1234.tmp",  # of another target
        f".{target}.safetensors.abcd1234.tmp",  # of a target whose name begins in the same way
        f".b{target}.abcd1234.tmp",
        f".{target}.tmp",
        f".{target}.abcd1234.tmp.txt",
        f".{target}.abcd1234",
        f".{target}.my notes.tmp",
        f"{target}.abcd1234.tmp",
        f"{target}.bak",
        "notes.tmp",
    }
    for one in (*ours, *(tmp_path / name for name in kept)):
        one.write_bytes(b"half of a file")
    (tmp_path / "folder.tmp").mkdir()
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / ours[0].name).write_bytes(b"of another folder")
    ll.save(adapted(), path)
    assert names(tmp_path) == sorted({target, "folder.tmp", "elsewhere", *kept})
    assert all((tmp_path / name).read_bytes() == b"half of a file" for name in kept)
    assert names(other) == [ours[0].name]
    ll.load(nn.Sequential(nn.Linear(8, 8)), path, on_base_mismatch="ignore")


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
@pytest.mark.parametrize(("module", "function"), [("os", "fsync"), ("os", "replace")])
def test_what_a_killed_process_leaves_goes(module: str, function: str, tmp_path: Path) -> None:
    path = tmp_path / TARGET
    (tmp_path / "notes.tmp").write_text("mine")
    script = KILLED.format(module=module, function=function)
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    ll.inspect(path)  # the file of the save before it
    ll.save(adapted(), path)
    assert names(tmp_path) == [TARGET, "notes.tmp"]


@pytest.mark.skipif(os.name == "nt", reason="a folder is no obstacle there, an open file is")
def test_what_cannot_be_removed_is_no_reason_to_fail(tmp_path: Path) -> None:
    """A folder of such a name is nobody's temporary file."""
    (tmp_path / f".{TARGET}.abcd1234.tmp").mkdir()
    ll.save(adapted(), tmp_path / TARGET)
    assert names(tmp_path) == [f".{TARGET}.abcd1234.tmp", TARGET]


def test_a_save_that_is_under_way_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread saves to the same file after the first one has written its own and before it renames it."""
    path, replace, thread, overtaken = tmp_path / TARGET, os.replace, Thread(), []

    def overtake(*given: str | Path) -> None:
        if not overtaken:
            overtaken.append(True)
            thread(lambda: ll.save(adapted(1), path))
        replace(*given)

    monkeypatch.setattr(os, "replace", overtake)
    ll.save(adapted(2), path)
    thread.end()
    assert overtaken
    assert names(tmp_path) == [TARGET]
    assert ll.inspect(path).seed in (1, 2)


def test_many_saves_at_once(tmp_path: Path) -> None:
    path, threads, models = tmp_path / TARGET, [Thread() for _ in range(3)], [adapted(seed) for seed in range(3)]
    pending = [
        thread.start(lambda model=model: [ll.save(model, path) for _ in range(20)])
        for thread, model in zip(threads, models, strict=True)
    ]
    for wait in pending:
        wait()
    for thread in threads:
        thread.end()
    assert names(tmp_path) == [TARGET]
    assert ll.inspect(path).seed in range(3)
