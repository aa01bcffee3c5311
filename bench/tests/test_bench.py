"""The benchmark: its model, its runs, its command."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from lora_lite_bench.command import bench
from lora_lite_bench.comparing.results import read
from lora_lite_bench.machine.costs import PeakMemory, added_macs_per_token
from lora_lite_bench.runs.methods import FULL, HEAD, fitting, matched_rank, parameters_of
from lora_lite_bench.runs.run import Job, run
from lora_lite_bench.tasks import make_task
from lora_lite_bench.tasks.language.arithmetic import problems
from lora_lite_bench.tasks.language.base_model import (
    PACKAGED,
    encode,
    exact_match,
    load_base,
    loss_of,
    new_model,
    new_tokenizer,
)
from torch import nn

import lora_lite as ll

SMALL = {"batch_size": 8, "test_count": 20, "valid_count": 10}
JOB = Job("shifted", SMALL, "pissa", {"r": 2}, seed=3, lr=5e-3, steps=8)
TINY = ["--steps", "8", "--quick", "--jobs", "1", "--no-anchors", "--knob", "test_count=20", "--knob", "valid_count=10"]


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the page that the command writes: they take the most of its time."""
    monkeypatch.setattr("lora_lite_bench.report.page.pictures", lambda table: iter(()))


def test_the_base_knows_its_task_and_not_the_shifted_one() -> None:
    model, tokenizer = load_base()
    own, shifted = (exact_match(model, tokenizer, problems(task, "test", 1000, seed=0)) for task in ("own", "shifted"))
    assert own >= 0.95
    assert shifted <= 0.05
    card = (PACKAGED / "README.md").read_text(encoding="utf-8")
    assert f"**{problems('own', 'test', 1, seed=0)[0].answer}** | {own:.1%} |" in card
    assert f"**{problems('shifted', 'test', 1, seed=0)[0].answer}** | {shifted:.1%} |" in card


def test_the_base_is_small() -> None:
    model, _ = load_base()
    assert 0.5e6 <= sum(p.numel() for p in model.parameters()) <= 2e6
    assert (PACKAGED / "model.safetensors").stat().st_size <= 3_000_000
    assert model.config.model_type == "qwen3"


def test_encoding_weighs_the_answer_only() -> None:
    tokenizer = new_tokenizer()
    batch = problems("own", "train", 8, seed=0)
    encoded = encode(tokenizer, batch)
    for p, ids, mask, weights in zip(
        batch, encoded["input_ids"], encoded["attention_mask"], encoded["weights"], strict=True
    ):
        assert tokenizer.decode(ids[weights > 0]).replace(" ", "") == p.answer + "<eos>"
        assert (
            int(mask.sum())
            == len(p.question.replace("?", "? ").split()) - 2 + sum(map(str.isdigit, p.question)) + len(p.answer) + 1
        )
        assert not weights[mask == 0].any()


def test_loss_is_the_mean_over_the_weighted_tokens() -> None:
    tokenizer = new_tokenizer()
    torch.manual_seed(0)
    model = new_model(tokenizer)
    batch = encode(tokenizer, problems("own", "train", 3, seed=0))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    chosen = [
        -logits[row, at - 1, batch["input_ids"][row, at]] for row, at in (batch["weights"] > 0).nonzero().tolist()
    ]  # fmt: skip
    torch.testing.assert_close(loss_of(model, batch), torch.stack(chosen).mean())


def test_macs_are_those_of_the_formulas() -> None:
    task = make_task("shifted", SMALL)
    sizes = [(128, 128)] * 4 + [(128, 256)] * 2 + [(256, 128)]
    per_rank = 4 * sum(d_in + d_out for d_in, d_out in sizes)
    for cfg, expected in (
        (ll.LoRAConfig(r=8), 8 * per_rank),
        (ll.PiSSAConfig(r=4), 2 * 4 * per_rank),
        (ll.IA3Config(), 0),
        (ll.IA3FFConfig(), 0),
        (ll.RoAdConfig(), 0),
        (ll.DoRAConfig(r=8), 8 * per_rank),
        (ll.DeLoRAConfig(r=8), 2 * 8 * per_rank),
        (ll.DeLoRAConfig(r=8, frozen_copy=False), 8 * per_rank),
        (ll.HRAConfig(r=8), 4 * sum(2 * 8 * d_in + 8 * 8 for d_in, _ in sizes)),
        (ll.OFTConfig(block_size=32), 4 * sum(32 * d_in for d_in, _ in sizes)),
        (ll.LoRAXSConfig(r=8), 8 * per_rank + 4 * len(sizes) * 8 * 8),
        (ll.SSVDConfig(r=8), 8 * per_rank + 4 * len(sizes) * 8 * 8),
        (ll.AntiPaSTOConfig(r=8), 8 * per_rank + 4 * len(sizes) * 8 * 4),
    ):
        model, tokenizer = task.load()
        ll.attach(model, cfg)
        batch = next(task.batches(tokenizer, "train", 0))
        assert added_macs_per_token(model, task.inputs(batch)) == expected


def test_peak_memory_counts_live_storages() -> None:
    layers = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(3)))
    x = torch.randn(1000, 256)
    one = 1000 * 256 * 4
    with PeakMemory() as memory, torch.no_grad():
        layers(x)
    assert memory.peak == 2 * one, "input and output of the layer that is running"
    with PeakMemory() as memory:
        y = layers(x)
        view = y.T
    assert memory.peak == memory.live == 3 * one, "all three outputs are kept for backward; a view is no new memory"
    del y, view
    assert memory.live == 0


def test_peak_memory_counts_the_parts_of_sparse_tensors() -> None:
    indices, values = torch.tensor([[0, 1, 2], [3, 1, 0]]), torch.ones(3)
    with warnings.catch_warnings(), PeakMemory() as memory:
        warnings.simplefilter("ignore")  # sparse tensors are in beta, and so on
        pairs = torch.sparse_coo_tensor(indices, values, (4, 4))
        assert memory.live == 0, "made of what was there before"
        rows = torch.sparse_csr_tensor(torch.arange(4), indices[1], values, (3, 4))
        assert memory.live == 4 * 8
    del pairs, rows
    assert memory.live == 0


def test_a_run() -> None:
    steps: list[None] = []
    result = run(JOB, advance=lambda: steps.append(None))
    assert (result.rank, result.layers) == (2, 28)
    assert len(result.losses) == len(steps) == 8
    assert result.reload_error is not None
    assert result.reload_error <= 1e-5
    assert result.trainable == 2 * 4 * (4 * 256 + 3 * 384)
    assert result.file_bytes is not None
    assert result.file_bytes > 4 * result.trainable
    assert result.own is not None
    again = run(JOB)
    assert replace(again, init_s=0, train_s=0) == replace(result, init_s=0, train_s=0)


def test_methods_and_rates_see_the_same_batches_and_the_same_start() -> None:
    first = {
        (method, lr): run(replace(JOB, method=method, fields={}, lr=lr, steps=1, whole=False)).losses
        for method in ("lora", "ia3", FULL)
        for lr in (1e-3, 1e-2)
    }
    assert len({tuple(losses) for losses in first.values()}) == 1
    assert run(replace(JOB, seed=4, steps=1, whole=False)).losses not in first.values()


def test_anchors_train_what_they_say() -> None:
    task = make_task("shifted", SMALL)
    model, _ = task.load()
    everything = sum(p.numel() for p in model.parameters())
    assert run(replace(JOB, method=FULL, fields={}, steps=2, whole=False)).trainable == everything
    head = run(replace(JOB, method=HEAD, fields={}, steps=2))
    assert head.trainable == model.config.vocab_size * 128, "a tied head has a weight of its own"
    assert head.own is not None


def test_a_hopeless_run_is_stopped() -> None:
    result = run(replace(JOB, method=FULL, fields={}, lr=1e3, steps=50))
    assert len(result.losses) < 50
    assert result.stopped.startswith("loss ")
    assert result.test is None


def test_a_default_rank_is_cut_to_the_room_that_there_is() -> None:
    task = make_task("shifted", {})
    assert fitting(task, "antipasto", {}) == {"r": 128}
    assert fitting(task, "antipasto", {"r": 64}) == {"r": 64}
    assert fitting(task, "lora", {}) == {}


@pytest.mark.slow
def test_matched_ranks_train_about_as_much() -> None:
    task = make_task("shifted", {})
    wanted = parameters_of(task, "lora", {})
    assert matched_rank(task, "pissa", {}, wanted) == 8
    assert matched_rank(task, "ia3", {}, wanted) is None
    assert matched_rank(task, "hra", {}, wanted) == 16, "of even ranks alone: 15 would be nearer"
    assert matched_rank(task, "shira", {}, wanted) == 8, "half the layer's size is the most that it takes"
    rank = matched_rank(task, "lora_xs", {}, wanted)
    assert rank == 50
    assert abs(parameters_of(task, "lora_xs", {"r": rank}) - wanted) <= 0.1 * wanted


def test_a_variant_that_writes_the_base_is_caught(registered: Any, toy: SimpleNamespace) -> None:
    @ll.hookimpl
    def init(layer: nn.Module) -> None:
        layer.weight.data += 1

    toy.init = init
    registered(toy, name="toy")
    with pytest.raises(RuntimeError, match="variant 'toy' has changed the base model's weights"):
        run(replace(JOB, method="toy", fields={}))


def test_a_variant_that_forgets_a_tensor_is_caught(registered: Any, toy: SimpleNamespace) -> None:
    toy.param_specs = ll.hookimpl(
        lambda d_out: {"lora_h": ll.ParamSpec((d_out,)), "lora_c": ll.ParamSpec((1,), as_buffer=True, persistent=False)}
    )

    @ll.hookimpl
    def forward(y: torch.Tensor, params: dict[str, torch.Tensor]) -> torch.Tensor:
        params["lora_c"] += 0.01  # a state that is not saved
        return y + params["lora_h"] + params["lora_c"]

    toy.forward = forward
    registered(toy, name="toy")
    with pytest.raises(RuntimeError, match="variant 'toy' computes something else after save and load"):
        run(replace(JOB, method="toy", fields={}))


def test_the_command_and_going_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "results.jsonl"
    arguments = ["ia3", *TINY, "--lr", "0.01", "--out", str(out), "--set", "layers=[0, 1]"]
    done = CliRunner().invoke(bench, arguments)
    assert done.exit_code == 0, done.output
    assert "MACs/token" in done.output
    assert f"3 lines in {out}" in done.output
    assert "<img" in (tmp_path / "results.html").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["job"]["seed"] for line in lines if line["kind"] == "run"] == [0, 1]
    assert lines[0]["run"]["config"]["layers"] == [0, 1]
    assert lines[0]["job"]["steps"] == len(lines[0]["run"]["losses"]) == 8
    assert {"torch", "transformers", "lora-lite-core", "lora-lite-ortho", "processor"} <= set(lines[0]["environment"])

    text = out.read_bytes()
    out.write_bytes(text + text[:100])  # killed in the middle of a line
    monkeypatch.setattr("lora_lite_bench.report.page.pictures", lambda table: iter(()))
    again = CliRunner().invoke(bench, arguments)
    assert again.exit_code == 0, again.output
    assert out.read_bytes() == text, "the half line is gone, and nothing was run again"
    assert len(read([out])) == 3


def test_other_code_is_another_run(tmp_path: Path) -> None:
    before = JOB.key()
    assert JOB.key() == before
    assert replace(JOB, lr=1e-3).key() != before
    assert replace(JOB, label="as shown").key() == before
    assert len(before["source"]) == 12


def test_mistakes_on_the_command_line(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "r")]
    for arguments, message in (
        (["lora", "--set", "r"], "'r' is not FIELD=VALUE"),
        (["lora", "--set", "rank=3", *out], "LoRAConfig has no field 'rank'; did you mean 'r'?"),
        (["lora", "--task", "shiftd", *out], "no task is called 'shiftd'; did you mean 'shifted'?"),
        (["lora", "--knob", "gifts=3", *out], "task 'shifted' has no knob 'gifts'; did you mean 'gift'?"),
        (["lora", "--full", "--quick", *out], "--full and --quick: give one of them"),
        (["lora", "--out", str(tmp_path / "no" / "r")], "does not exist"),
    ):
        done = CliRunner().invoke(bench, arguments)
        assert done.exit_code != 0
        assert message in done.output, arguments


@pytest.mark.usefixtures("without_pictures")
def test_one_broken_variant_does_not_end_the_others(registered: Any, toy: SimpleNamespace, tmp_path: Path) -> None:
    toy.forward = ll.hookimpl(lambda y, params: y + params["lora_x"])
    registered(toy, name="toy")
    out = tmp_path / "r.jsonl"
    done = CliRunner().invoke(bench, ["toy", "ia3_ff", *TINY, "--lr", "0.01", "--out", str(out)])
    assert done.exit_code == 1
    assert "toy failed: KeyError('lora_x')" in done.output
    assert {record.job.method for record in read([out])} == {"ia3_ff"}
