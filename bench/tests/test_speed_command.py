"""`lora-lite speed`: its rows, its measurements, its tables and its file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from lora_lite_bench.machine.ceilings import bytes_per_second, floor_seconds, operations_per_second
from lora_lite_bench.machine.timing import interleave, ratio
from lora_lite_bench.speed import parts
from lora_lite_bench.speed.command import speed
from lora_lite_bench.speed.contestants import (
    FROZEN,
    Case,
    Settings,
    builders,
    calibration,
    cases,
    has_lycoris,
    peft_config,
)
from lora_lite_bench.speed.growth import Sizes, growth
from lora_lite_bench.speed.layers import Cell, OneLayer, floor_of, measure_cell, one_pass
from lora_lite_bench.speed.starts import InitSettings, eva, pissa, principal_angle
from lora_lite_bench.speed.steps import Contestant, measure, new_model
from lora_lite_bench.speed.tables import GROWTH_HEADS, HEADS, LYCORIS_HEADS, cell_rows, step_rows

import lora_lite as ll

TINY = Settings(hidden=64, rank=4, layers=1, batch=2, length=8, rounds=1)


def test_lora_is_always_there_and_two_methods_bring_rows_of_their_own() -> None:
    assert [case.label for case in cases(["ia3"], TINY)] == ["lora", "ia3"]
    rows = cases(["lora", "antipasto", "delora"], TINY)
    assert [case.label for case in rows] == ["lora", "lora r=32", "antipasto r=32", "delora", "delora, zero B"]
    assert rows[2].reference == "lora r=32"
    assert rows[2].config(TINY).to_dict()["r"] == 32
    assert rows[4].config(TINY).to_dict()["frozen_copy"] is False


TWINS = (
    "lora",
    "eva",
    "pissa",
    "dora",
    "delora",
    "hra",
    "oft",
    "road",
    "ia3",
    "ia3_ff",
    "loha",
    "lokr",
    "vera",
)


@pytest.mark.parametrize("name", TWINS)
def test_the_twin_in_peft_trains_as_many_parameters(name: str) -> None:
    base, data = OneLayer(64), calibration(TINY, 64, "x")
    case = Case(name, name)
    build = builders([case], TINY, base.requires_grad_(False), data)
    assert [*build][:3] == [FROZEN, name, f"{name} in peft"]
    counts = [sum(p.numel() for p in make(OneLayer(64).requires_grad_(False)).parameters() if p.requires_grad)
              for make in build.values()]  # fmt: skip
    assert counts[0] == 0
    assert counts[1] == counts[2] > 0


def test_methods_that_peft_has_not() -> None:
    for name in ("lora_xs", "ssvd", "antipasto"):
        assert peft_config(ll.LoraLiteConfig(variant=name), OneLayer(64), ["layer"]) is None


def test_lycoris_adapts_the_same_layers_with_as_many_parameters() -> None:
    if not has_lycoris():
        pytest.skip("pip install lycoris-lora")
    base = new_model(TINY)
    build = builders(cases(["loha"], TINY), TINY, base, None)
    models = {name: Contestant(make(new_model(TINY)), TINY) for name, make in build.items()}
    assert models["loha in lycoris"].trainable == models["loha"].trainable
    assert models["lora in lycoris"].trainable == models["lora"].trainable
    models["lora in lycoris"].step()


def test_interleaving_prepares_each_time_and_drops_the_warm_up() -> None:
    calls: list[str] = []

    def prepare() -> object:
        calls.append("prepared")
        return lambda: calls.append("run")

    samples = interleave({"a": prepare, "b": prepare}, 3, "cpu", warm_up=2)  # type: ignore[dict-item]
    assert calls == ["prepared", "run"] * 10
    assert {name: len(found) for name, found in samples.items()} == {"a": 3, "b": 3}
    assert ratio([(1, 2), (3, 2), (8, 2)], [(1, 1), (1, 1), (1, 1)], 0) == 3
    assert ratio([(1, 2), (3, 2), (8, 2)], [(1, 1), (1, 1), (1, 1)], 1) == 2


def test_a_step_moves_the_adapter_only_and_decoding_goes_on_from_the_prompt() -> None:
    model = new_model(TINY)
    adapter = ll.attach(model, ll.LoRAConfig(r=2))
    contestant = Contestant(model, TINY)
    before = {name: p.clone() for name, p in model.named_parameters()}
    contestant.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    assert all(p.grad is None for p in adapter.parameters())
    assert contestant.peak_bytes() > 0
    for _ in range(2):
        decode = contestant.decoding()
        assert contestant.cache.get_seq_length() == TINY.length
        decode()
        assert contestant.cache.get_seq_length() == TINY.length + 3


def test_the_floor_is_of_the_operations_or_of_the_bytes() -> None:
    operations, bandwidth = operations_per_second("cpu", torch.float32), bytes_per_second("cpu", 1 << 20)
    assert operations > 1e8
    assert bandwidth > 1e8
    assert floor_seconds("cpu", torch.float32, operations, 1.0) == pytest.approx(1)
    assert floor_seconds("cpu", torch.float32, 1.0, 1 << 19) == pytest.approx((1 << 19) / bandwidth)
    model, x = OneLayer(64).requires_grad_(False), torch.randn(512, 64)
    floors = [floor_of(model, x[:n], n, one_pass(model, x[:n], n > 1), TINY) for n in (1, 512)]
    assert floors[1] == pytest.approx(
        2 * 2 * 512 * 64 * 64 / operations
    )  # the weight's product, and the input's gradient
    assert floors[0] == pytest.approx(4 * (64 * 64 + 2 * 64) / bytes_per_second("cpu", 1 << 15))


def test_one_layer() -> None:
    measured = measure_cell(Cell(64, "bfloat16", False), cases(["ia3"], TINY), [1, 8], TINY, lambda kind: None)
    rows = cell_rows(measured, 1)
    assert [row["label"] for row in rows] == [FROZEN, "lora", "ia3"]
    for row in rows[1:]:
        assert row["1_floor"] > 1
        assert {"8_ms", "8_peft", "8_frozen", "8_floor"} <= row.keys()
    assert not measured.failed


def test_what_does_not_compile_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        def call(*_: Any) -> Any:
            raise RuntimeError("no compiler\nhere")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    measured = measure_cell(Cell(64, "float32", True), cases([], TINY), [1], TINY, lambda kind: None)
    assert measured.failed["lora"] == "RuntimeError: no compiler"
    assert [set(row) for row in cell_rows(measured, 1)] == [{"label"}, {"label"}]


def test_what_does_not_run_is_said_and_the_others_are_timed() -> None:
    """PEFT's Poly asks for task ids at every call."""
    case, said = Case("poly", "poly"), "ValueError: task_ids should not be None."
    layer = measure_cell(Cell(64, "float32", False), [case], [1, 8], TINY, lambda kind: None)
    assert layer.failed == {"poly in peft": said}
    assert layer.samples[8].keys() == {FROZEN, "poly"}
    model = measure([case], TINY, lambda kind: None)
    assert model.failed == {"poly in peft": said}
    assert step_rows(model, 1)[1].keys() >= {"step_ms", "token_ms", "attach_ms", "save_ms", "load_ms", "peak_mb"}
    assert "poly in peft" not in model.samples["attach"]
    rows = growth([case], TINY, Sizes((2,), (), ()), lambda: None)
    assert rows[0].failed == {"poly in peft": said}


def test_growth() -> None:
    rows = growth(cases([], TINY), TINY, Sizes((2, 3), (2,), (1, 3)), lambda: None)
    names = ["2 layers", "3 layers", "rank 2", "1 adapter on 10 layers", "3 adapters on 10 layers"]
    assert [row.label for row in rows] == names
    for row in rows:
        assert row.samples.keys() == {"attach", "token", "step"}
        assert {*row.samples["attach"]} - {"lora in lycoris"} == {"lora", "lora in peft"}
        assert row.samples["token"].keys() >= {FROZEN, "lora", "lora in peft"}


def test_starts() -> None:
    small = InitSettings(width=64, layers=2, rank=4, tokens=2048, rounds=1)
    rows = [*eva(small, lambda: None), *pissa(small, lambda: None)]
    assert [row.against for row in rows] == ["peft, tau=0.99", "peft, tau=0.999", "torch.linalg.svd"]
    assert all(row.our_error < 1e-5 for row in rows)
    assert all(row.ours_ms > 0 and row.theirs_ms > 0 for row in rows)


def test_imports_are_timed_in_new_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "STATEMENTS", {"nothing": "pass", "work": "sum(range(10**7))"})
    rows = parts.imports(1, lambda: None)
    assert [row.label for row in rows] == ["nothing", "work"]
    assert rows[1].ms > 10 * max(rows[0].ms, 1e-6)


def test_principal_angle() -> None:
    plane = torch.eye(3, dtype=torch.float64)[:2]
    turned = torch.tensor([[1.0, 0, 0], [0, 0.8, 0.6]])
    assert principal_angle(turned, plane) == pytest.approx(0.6435, abs=1e-4)
    assert principal_angle(plane * 5, plane) == pytest.approx(0)


def _tables(output: str) -> list[list[list[str]]]:
    """The Markdown tables of an output, each a list of rows of cells."""
    found: list[list[list[str]]] = [[]]
    for line in output.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("| \n").split("|")])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    threads = torch.get_num_threads()
    asked = ["ia3", "lora_xs", "--quick", "--part=model", "--part=layers"]
    try:
        done = CliRunner().invoke(speed, [*asked, "--out", str(out)])
    finally:
        torch.set_num_threads(threads)
    assert done.exit_code == 0, done.output
    model, *others = _tables(done.output)
    assert model[0] == list(HEADS)
    assert [row[0] for row in model[2:]] == ["frozen", "lora", "ia3", "lora_xs"]
    assert model[-1][2] == "–", "peft has no LoRA-XS"
    beside = others[0] if has_lycoris() else []
    assert not beside or [row[0] for row in beside] == [LYCORIS_HEADS[0], "-" * len(beside[1][0]), "lora"]
    layers = others[-1]
    assert layers[0][:3] == ["method", "1 token µs", "/ PEFT"]
    report = json.loads(out.read_text(encoding="utf-8"))
    assert {"torch", "peft", "transformers", "lora-lite-core", "python"} <= set(report["versions"])
    section = report["sections"][0]
    row = section["rows"][2]
    assert (row["label"], row["trainable"]) == ("ia3", 4 * 64 + 2 * 192 + 64)
    for kind in ("step", "token", "attach", "save", "load"):
        samples = section["samples"][kind]
        ours, peft = ([tuple(sample) for sample in samples[name]] for name in ("ia3", "ia3 in peft"))
        assert row[f"{kind}_peft"] == pytest.approx(ratio(ours, peft, 1))


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    done = CliRunner().invoke(speed, ["lora", "--quick"])
    assert done.exit_code == 1
    assert "type: pip install peft" in done.output


def test_growth_in_each_dtype(tmp_path: Path) -> None:
    threads, out = torch.get_num_threads(), str(tmp_path / "speed.json")
    asked = ["ia3", "--quick", "--part=growth", "--dtype=float32", "--dtype=bfloat16", "--out", out]
    try:
        done = CliRunner().invoke(speed, asked)
    finally:
        torch.set_num_threads(threads)
    assert done.exit_code == 0, done.output
    assert [table[0] for table in _tables(done.output)] == [list(GROWTH_HEADS)] * 2
    assert [line for line in done.output.splitlines() if line.startswith("growth,")] == [
        "growth, float32",
        "growth, bfloat16",
    ]
