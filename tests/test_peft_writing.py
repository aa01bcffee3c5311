"""Folders in PEFT's layout appear whole or not at all, whatever the system does in between."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite_core.attached.records import targets_of
from lora_lite_core.files.peft import folder_writing as writing

CONFIG, WEIGHTS, REPORT = "adapter_config.json", "adapter_model.safetensors", "lora_lite_export.json"
EXPORTS: dict[str, Callable[..., Any]] = {"export_lora": ll.export_lora, "export_peft": ll.export_peft}


def net(rank: int = 2, size: int = 16) -> nn.Module:
    torch.manual_seed(rank)
    model = nn.ModuleDict({"a": nn.Linear(size, size), "b": nn.Linear(size, size)})
    for p in ll.attach(model, ll.LoRAConfig(r=rank)).parameters():
        p.data.normal_()
    return model


def seen(folder: Path) -> dict[str, str]:
    """Names and contents."""
    files = [path for path in folder.iterdir() if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rank_in(folder: Path) -> int | None:
    """The rank by which the files go together, None where there is no adapter."""
    from safetensors.torch import load_file

    if not (folder / CONFIG).exists():
        return None
    rank = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["r"]
    assert load_file(folder / WEIGHTS)["base_model.model.a.lora_A.weight"].shape[0] == rank
    report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    assert report.get("rank", rank) == rank  # export_peft's says none
    return rank


@pytest.fixture(autouse=True)
def disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is quick: what is synced shows in no test."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(params=EXPORTS)
def export(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return EXPORTS[request.param]


def test_other_files_in_the_folder_stay(export: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    (tmp_path / ".adapter_notes.old").write_text("mine", encoding="utf-8")
    for rank in (2, 3):
        export(net(rank), tmp_path)
        assert rank_in(tmp_path) == rank
        assert sorted(seen(tmp_path)) == [".adapter_notes.old", "README.md", CONFIG, WEIGHTS, REPORT]


@pytest.mark.parametrize("there", [False, True], ids=["a new folder", "an adapter there"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: (path / CONFIG).mkdir(), "adapter_config.json is a folder; a file is to be written there"),
        (lambda path: (path / WEIGHTS).mkdir(), "adapter_model.safetensors is a folder; a file is to be written there"),
        (lambda path: (path / f".{CONFIG}.new").mkdir(), "cannot be written: "),
        (lambda path: (path / f".{WEIGHTS}.new").mkdir(), "cannot be written: "),
    ],
    ids=["config", "weights", "config beside", "weights beside"],
)
def test_something_in_the_way(make: Any, message: str, there: bool, export: Callable[..., Any], tmp_path: Path) -> None:
    if there:
        export(net(2), tmp_path)
        for part in (CONFIG, WEIGHTS):
            if f"{part} is" in message:
                (tmp_path / part).unlink()
    make(tmp_path)
    before, names = seen(tmp_path), sorted(os.listdir(tmp_path))
    with pytest.raises(ll.AdapterFileError, match=message):
        export(net(3), tmp_path)
    assert (seen(tmp_path), sorted(os.listdir(tmp_path))) == (before, names)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no/where", "folder .* does not exist; make it first"),
        ("file", "file is a file; give a folder"),
        ("file/under", "folder .*file does not exist; make it first"),
        ("x" * 300, "cannot be written: File name too long"),
        ("circle", "circle cannot be written: "),
        ("circle/x", "circle does not exist; make it first|cannot be written"),
        ("nul\\0", "cannot be written: .*null"),
    ],
)
def test_paths(path: str, message: str, export: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(ll.AdapterFileError, match=message):
        export(net(), str(tmp_path / path).replace("\\0", "\0"))
    assert sorted(os.listdir(tmp_path)) == ["circle", "file"]


@pytest.mark.parametrize("path", [None, 3, b"x"], ids=repr)
def test_what_is_no_path(path: Any, export: Callable[..., Any]) -> None:
    with pytest.raises(ll.AdapterFileError, match="cannot be written: "):
        export(net(), path)


@pytest.mark.parametrize("there", [False, True], ids=["a new folder", "an adapter there"])
def test_a_full_disk(there: bool, export: Callable[..., Any], tmp_path: Path) -> None:
    """As far as a process can make one: files may not grow beyond a size."""
    folder = tmp_path / "out"
    if there:
        export(net(2), folder)
    before = seen(folder) if there else {}
    model = net(3, size=256)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, limit[1]))
    try:
        with pytest.raises(ll.AdapterFileError, match="out/.*safetensors.* cannot be written: File too large"):
            export(model, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert seen(folder) == before if there else not folder.exists()


class Stop(BaseException):
    """What no `except Exception` sees."""


def steps(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> list[str]:
    """Call act(n) before the n-th thing that is done to a file system."""
    done: list[str] = []

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            done.append(name)
            act(len(done) - 1)
            return real(*args, **options)

        return call

    for module, names in ((os, ("replace", "fsync")), (Path, ("unlink", "mkdir"))):
        for name in names:
            monkeypatch.setattr(module, name, wrapped(name, getattr(module, name)))
    return done


def number_of_steps(folder: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        done = steps(patch, lambda n: None)
        ll.export_lora(net(3), folder)
    return len(done)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        pytest.param(PermissionError(13, "Permission denied"), marks=pytest.mark.slow),
        Stop(),
    ],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.parametrize("there", [False, True], ids=["a new folder", "an adapter there"])
def test_a_failure_at_any_step(there: bool, error: BaseException, tmp_path: Path) -> None:
    """As before or complete; the one with the config is complete, and the next export leaves nothing behind."""
    for number in range(number_of_steps(tmp_path / "steps") + 6 * there):
        folder = tmp_path / f"{number}"
        if there:
            ll.export_lora(net(2), folder)

        def act(n: int, number: int = number) -> None:
            if n == number:
                raise error

        with pytest.MonkeyPatch.context() as patch:
            steps(patch, act)
            try:
                ll.export_lora(net(3), folder)
                failed = False
            except (ll.AdapterFileError, Stop):
                failed = True
        found = rank_in(folder) if folder.exists() else None
        assert found in ({2, 3} if there else {None, 3}), number
        if failed and found != 3:
            assert folder.exists() == there, number
        ll.export_lora(net(4), folder)
        assert rank_in(folder) == 4
        assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS, REPORT], number


@pytest.mark.slow
def test_a_process_that_is_killed_at_any_step(tmp_path: Path) -> None:
    """What is left is one adapter or none, never a mixture; the next export makes it whole, one that fails brings back
    what was there."""
    model = net(3)
    for number in range(number_of_steps(tmp_path / "steps") + 6):
        folder = tmp_path / f"{number}"
        ll.export_lora(net(2), folder)
        if (child := os.fork()) == 0:
            steps(pytest.MonkeyPatch(), lambda n, number=number: n == number and os.kill(os.getpid(), signal.SIGKILL))
            ll.export_lora(model, folder)
            os._exit(0)
        os.waitpid(child, 0)
        assert rank_in(folder) in (None, 2, 3), number
        with pytest.MonkeyPatch.context() as patch:

            def fails(*args: Any, **options: Any) -> None:
                raise OSError(28, "No space left on device")

            patch.setattr(writing, "write_tensors", fails)
            with pytest.raises(ll.AdapterFileError, match="No space left on device"):
                ll.export_lora(model, folder)
        assert rank_in(folder) in (2, 3), number
        ll.export_lora(model, folder)
        assert rank_in(folder) == 3
        assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS, REPORT], number


def test_two_exports_at_once(tmp_path: Path) -> None:
    """The second is told; the lock goes with the process that held it."""
    code = f"import fcntl, os\nfcntl.flock(os.open({str(tmp_path)!r}, os.O_RDONLY), fcntl.LOCK_EX)\nprint('here', flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"here\n"
        with pytest.raises(ll.AdapterFileError, match="is being written by another export; wait for that one"):
            ll.export_lora(net(), tmp_path)
        assert os.listdir(tmp_path) == []
        other.kill()
    ll.export_lora(net(), tmp_path)
    assert rank_in(tmp_path) == 2


def test_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def none(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    ll.export_lora(net(), tmp_path)
    monkeypatch.setattr(writing, "fcntl", None)
    ll.export_lora(net(3), tmp_path)
    assert rank_in(tmp_path) == 3


def test_the_model_is_not_changed_and_can_be_exported_again(tmp_path: Path) -> None:
    model = net(3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(ll.AdapterFileError, match="file is a file; give a folder"):
        ll.export_peft(model, tmp_path / "file")
    ll.export_peft(model, tmp_path / "out")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_values_that_json_does_not_have(tmp_path: Path) -> None:
    model = net()
    for target in targets_of(model, "default").values():
        object.__setattr__(target.cfg, "alpha", float("inf"))
    with pytest.raises(ll.MergeError, match="PEFT's config cannot hold infinity or NaN"):
        ll.export_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_that_are_gone(export: Callable[..., Any], tmp_path: Path) -> None:
    model: Any = net()
    model["a"] = nn.Linear(16, 16)
    with pytest.raises(ll.ModelStateError, match="adapter 'default' is not whole any more: a was removed or replaced"):
        export(model, tmp_path / "out")
    del model["a"]
    with pytest.raises(ll.ModelStateError, match="adapter 'default' is not whole any more: a was removed or replaced"):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_same_adapter_gives_the_same_bytes(export: Callable[..., Any], tmp_path: Path) -> None:
    export(net(), tmp_path / "one")
    export(net(), tmp_path / "two")
    assert seen(tmp_path / "one") == seen(tmp_path / "two")


def test_the_files_can_be_read_by_whom_the_umask_says(export: Callable[..., Any], tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        export(net(), tmp_path / "out")
    finally:
        os.umask(umask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {CONFIG: 0o640, WEIGHTS: 0o640, REPORT: 0o640}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's and transformers' own
@pytest.mark.parametrize("export", EXPORTS)
def test_peft_finds_the_base_by_what_a_folder_says(export: str, tmp_path: Path) -> None:
    """`AutoPeftModelForCausalLM`, which people are used to, needs a class beside the base's name."""
    from peft import AutoPeftModel, AutoPeftModelForCausalLM
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    for p in ll.attach(model, ll.LoRAConfig(r=2)).parameters():
        p.data.normal_()
    EXPORTS[export](model, tmp_path / "folder")
    tokens = torch.arange(5)[None]
    for opener in (AutoPeftModelForCausalLM, AutoPeftModel):
        again = opener.from_pretrained(tmp_path / "folder").eval()
        torch.testing.assert_close(again(input_ids=tokens).logits, model(tokens).logits)


def test_a_folder_of_a_nameless_base_says_no_class(tmp_path: Path) -> None:
    ll.export_lora(net(), tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["auto_mapping"] is None
