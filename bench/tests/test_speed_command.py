"""`lora-lite speed`: its rows, its measurements, its table and its file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from lora_lite_bench.speed.command import HEADS, speed
from lora_lite_bench.speed.peers import peft_config
from lora_lite_bench.speed.starts import InitSettings, eva, pissa, principal_angle
from lora_lite_bench.speed.steps import Case, Contestant, Settings, attach_theirs, cases, interleave, new_model, ratio

import lora_lite as ll

TINY = Settings(hidden=64, rank=4, layers=1, batch=2, length=8, rounds=1)


def test_lora_is_always_there_and_two_methods_bring_rows_of_their_own() -> None:
    assert [case.label for case in cases(["ia3"], TINY)] == ["lora", "ia3"]
    rows = cases(["lora", "antipasto", "delora"], TINY)
    assert [case.label for case in rows] == ["lora", "lora r=32", "antipasto r=32", "delora", "delora, zero B"]
    assert rows[2].reference == "lora r=32"
    assert rows[2].config(TINY).to_dict()["r"] == 32
    assert rows[4].config(TINY).to_dict()["frozen_copy"] is False


@pytest.mark.parametrize("name", ["lora", "eva", "pissa", "dora", "delora", "hra", "oft", "road", "ia3", "ia3_ff"])
def test_the_twin_in_peft_trains_as_many_parameters(name: str) -> None:
    model = new_model(TINY)
    names = ["q_proj", "down_proj"]
    cfg = Case(name, name, {"target_names": names}).config(TINY)
    twin = Contestant(attach_theirs(new_model(TINY), peft_config(cfg, names)), TINY)
    ll.attach(model, cfg, calibration_data=[{"inputs_embeds": torch.randn(2, 64, 64)}] if name == "eva" else None)
    assert Contestant(model, TINY).trainable == twin.trainable


def test_methods_that_peft_has_not() -> None:
    for name in ("lora_xs", "ssvd", "antipasto"):
        assert peft_config(ll.LoraLiteConfig(variant=name), ["q_proj"]) is None


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


def test_a_step_moves_the_adapter_only() -> None:
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


def test_starts() -> None:
    small = InitSettings(width=64, layers=2, rank=4, tokens=2048, rounds=1)
    rows = [*eva(small, lambda: None), *pissa(small, lambda: None)]
    assert [row.against for row in rows] == ["peft, tau=0.99", "peft, tau=0.999", "torch.linalg.svd"]
    assert all(row.our_error < 1e-5 for row in rows)
    assert all(row.ours_ms > 0 and row.theirs_ms > 0 for row in rows)


def test_principal_angle() -> None:
    plane = torch.eye(3, dtype=torch.float64)[:2]
    turned = torch.tensor([[1.0, 0, 0], [0, 0.8, 0.6]])
    assert principal_angle(turned, plane) == pytest.approx(0.6435, abs=1e-4)
    assert principal_angle(plane * 5, plane) == pytest.approx(0)


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    threads = torch.get_num_threads()
    try:
        done = CliRunner().invoke(speed, ["ia3", "lora_xs", "--quick", "--no-init", "--out", str(out)])
    finally:
        torch.set_num_threads(threads)
    assert done.exit_code == 0, done.output
    table = [
        [cell.strip() for cell in line.strip("| \n").split("|")] for line in done.output.splitlines() if "|" in line
    ]
    assert table[0] == list(HEADS)
    assert [row[0] for row in table[2:]] == ["frozen", "lora", "ia3", "lora_xs"]
    assert table[-1][3] == "–", "peft has no LoRA-XS"
    report = json.loads(out.read_text(encoding="utf-8"))
    assert {"torch", "peft", "transformers", "lora-lite-core", "python"} <= set(report["versions"])
    row = report["rows"][2]
    assert row["config"]["variant"] == "ia3"
    assert row["trainable"] == 4 * 64 + 2 * 192 + 64
    samples = report["samples"]["step"]
    assert row["step_peft"] == pytest.approx(samples["ia3"][0][1] / samples["ia3 in peft"][0][1])


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    done = CliRunner().invoke(speed, ["lora", "--quick"])
    assert done.exit_code == 1
    assert "type: pip install peft" in done.output
