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
POSIX = pytest.mark.skipif(os.name == "nt", reason="no locks there that a killed process loses, and no SIGKILL")
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


def left_behind(path: Path, times: int = 1) -> dict[Path, bytes]:
    """The temporary files of saves, as processes leave them that are killed before they rename."""
    found: dict[Path, bytes] = {}
    replace = os.replace

    def watching(source: str | Path, target: str | Path) -> None:
        found[Path(source)] = Path(source).read_bytes()
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", watching)
        for seed in range(times):
            ll.save(adapted(seed), path)
    assert len(found) == times
    for one, data in found.items():
        one.write_bytes(data[: len(data) // 2])
    return found


@POSIX
@pytest.mark.parametrize("target", [TARGET, "a.safetensors", "[ab].safetensors", "ünter.v2.safetensors"])
def test_temporary_files_of_the_same_target_go(target: str, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    others = [tmp_path / "other.safetensors", tmp_path / f"{target}.safetensors", tmp_path / f"b{target}"]
    kept = {name for other in (*others, elsewhere / target) for name in left_behind(other)}
    foreign = {
        tmp_path / name for name in (f".{target}.notes", f"{target}.bak", "notes.tmp", ".tmp", f".{target}.mine.tmp")
    }
    for path in foreign:
        path.write_bytes(b"not ours")
    ours = left_behind(tmp_path / target, times=3)
    before = {path: path.read_bytes() for path in kept | foreign}
    ll.save(adapted(4), tmp_path / target)
    assert not any(path.exists() for path in ours)
    assert {path: path.read_bytes() for path in kept | foreign} == before
    assert ll.inspect(tmp_path / target).seed == 4


@POSIX
@pytest.mark.parametrize(
    ("module", "function"), [pytest.param("os", "fsync", marks=pytest.mark.slow), ("os", "replace")]
)
def test_what_a_killed_process_leaves_goes(module: str, function: str, tmp_path: Path) -> None:
    path = tmp_path / TARGET
    (tmp_path / "notes.tmp").write_text("mine")
    script = KILLED.format(module=module, function=function)
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    ll.inspect(path)  # the file of the save before it
    ll.save(adapted(), path)
    assert names(tmp_path) == [TARGET, "notes.tmp"]


@POSIX
def test_what_cannot_be_removed_is_no_reason_to_fail(tmp_path: Path) -> None:
    (stale,) = left_behind(tmp_path / TARGET)
    stale.unlink()
    stale.mkdir()
    ll.save(adapted(), tmp_path / TARGET)
    assert names(tmp_path) == sorted([stale.name, TARGET])


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
