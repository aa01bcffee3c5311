"""Two processes (gloo): what they train is what one trains, for every variant; files, meta, heads in shards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lora_lite as ll

from .distributed import (
    KINDS,
    NAMES,
    attach,
    base,
    checkpointed,
    each_variant,
    from_meta,
    heads,
    kinds,
    of_kind,
    swaps,
    together,
    token_ids,
    train,
    trained,
    trained_kind,
)

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")


def alone(name: str) -> torch.Tensor:
    model = base()
    attach(model, name)
    train(model, trained(model))
    return model(token_ids(9)).detach()


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["ddp", "fsdp1", "fsdp2"])
def test_every_variant_is_trained_as_by_one_process(wrap: str, tmp_path: Path) -> None:
    together(each_variant, wrap, str(tmp_path))
    found = torch.load(tmp_path / "outputs.pt")
    assert [*found] == NAMES
    for name in NAMES:
        expected = alone(name)
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=2e-4, msg=lambda text, n=name: f"{n}: {text}")
        if wrap == "fsdp2":
            again = base()
            ll.load(again, tmp_path / f"{name}.safetensors")
            torch.testing.assert_close(again(token_ids(9)).detach(), found[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_from_the_meta_device_through_shards(tmp_path: Path) -> None:
    expected: dict[str, torch.Tensor] = {}
    for name in NAMES:
        model = base()
        adapter = attach(model, name)
        expected[f"{name} new"] = model(token_ids(9)).detach()
        train(model, trained(model), steps=2)
        adapter.save(tmp_path / f"{name}.safetensors")
        expected[f"{name} file"] = model(token_ids(9)).detach()
    together(from_meta, str(tmp_path))
    found, refused = torch.load(tmp_path / "meta.pt")
    assert [*refused] == ["eva new"]
    assert "forbids the copy of its structure that a dry run needs" in refused["eva new"]
    assert {*found, *refused} == {*expected}
    for key, output in found.items():
        torch.testing.assert_close(output, expected[key], rtol=1e-4, atol=1e-5, msg=lambda text, k=key: f"{k}: {text}")


@pytest.mark.slow
def test_heads_and_refusals_in_shards(tmp_path: Path) -> None:
    together(heads, str(tmp_path))
    said = [torch.load(tmp_path / f"said{rank}.pt") for rank in range(2)]
    assert said[0].keys() == said[1].keys() == {"merge", "export", "attach", "detach", "load", "nowhere", "flat"}
    for what in ("merge", "export"):
        assert "is sharded (a DTensor" in said[0][what]
        assert "save the adapter, which gathers it, and load base and adapter in one process" in said[0][what]
    assert "the order is: load the base, attach, shard (FSDP2, DDP), compile" in said[0]["attach"]
    assert "a sharded model cannot lose its tensors" in said[0]["detach"]
    assert "does not exist" in said[0]["nowhere"]
    assert "the first process could not write the file: AdapterFileError: folder" in said[1]["nowhere"]
    assert "has no adapter 'second' that waits for its values" in said[0]["load"]
    assert "FSDP1 or ZeRO-3 keeps a part of it" in said[0]["flat"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lora", "hra"])
def test_the_example_trains_saves_and_goes_on(variant: str, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "examples/distributed_finetune.py"
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    shown: list[list[float]] = []
    for more in (["--out", first], ["--resume", first, "--out", second, "--steps", "5"]):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", script]
        done = subprocess.run(
            [*map(str, command), "--variant", variant, *map(str, more)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        shown.append([float(line.rpartition(" ")[2]) for line in done.stdout.splitlines() if line.startswith("step")])
    assert len(shown[0]) == 20
    assert shown[0][-1] < 0.99 * shown[0][0]
    assert shown[1][0] < 1.1 * shown[0][-1], "it goes on where it was"
    assert ll.inspect(second).variant == variant


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own
def test_other_kinds_of_layer_in_shards(tmp_path: Path) -> None:
    together(kinds, str(tmp_path))
    for kind in KINDS:
        for name in ("lora", "dora"):
            expected, _ = trained_kind(kind, name)
            again, _ = of_kind(kind)
            ll.load(again, tmp_path / f"{kind} {name}.safetensors")
            torch.testing.assert_close(again(token_ids(9)), expected(token_ids(9)), rtol=1e-3, atol=5e-4)


@pytest.mark.slow
def test_swaps_and_switches_in_processes(tmp_path: Path) -> None:
    expected: dict[str, torch.Tensor] = {}
    for name in ("lora", "hra", "pissa"):
        model = base()
        adapter = attach(model, name)
        train(model, trained(model), steps=3)
        adapter.save(tmp_path / f"{name}.safetensors")
        expected[f"{name} swapped"] = model(token_ids(9)).detach()
        with ll.strength(model, {"default": -0.5}):
            expected[f"{name} strength"] = model(token_ids(9)).detach()
        expected[f"{name} off"] = base()(token_ids(9)).detach()
        with ll.routed(model, ["default", None, "default", None]):
            expected[f"{name} routed"] = model(token_ids(9, (4, 5))).detach()
        train(model, trained(model), steps=2)
        expected[f"{name} trained"] = model(token_ids(9)).detach()
    together(swaps, str(tmp_path))
    found = torch.load(tmp_path / "swaps.pt")
    assert len(found) == 2 * len(expected)
    for key, value in found.items():
        _, _, which = key.partition(" ")
        torch.testing.assert_close(value, expected[which], rtol=1e-3, atol=2e-4, msg=lambda text, k=key: f"{k}: {text}")


@pytest.mark.slow
def test_checkpoints_of_torch(tmp_path: Path) -> None:
    together(checkpointed, str(tmp_path))
    found = torch.load(tmp_path / "checkpointed.pt")
    for name in ("lora", "hra", "dora"):
        torch.testing.assert_close(found[f"{name} again"], found[f"{name} first"], rtol=1e-5, atol=1e-6)
        model = base()
        ll.load(model, tmp_path / f"{name}.safetensors")
        torch.testing.assert_close(model(token_ids(9)).detach(), found[f"{name} first"], rtol=1e-4, atol=1e-5)
