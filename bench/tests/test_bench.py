"""The benchmark: its model, its measurements, its table."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from lora_lite_bench.base import PACKAGED, encode, exact_match, load_base, loss_of, new_model, new_tokenizer
from lora_lite_bench.command import bench
from lora_lite_bench.costs import PeakMemory, added_macs_per_token
from lora_lite_bench.run import Plan, run
from lora_lite_bench.summary import rows, standard_error
from lora_lite_bench.tasks import problems
from torch import nn

import lora_lite as ll

TINY = Plan(steps=10, batch_size=8, test_problems=20, valid_problems=10)


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


def test_exact_match_counts_whole_answers() -> None:
    model, tokenizer = load_base()
    asked = problems("own", "test", 40, seed=0)
    wrong = [type(p)(p.question, p.answer + "0") for p in asked]
    assert exact_match(model, tokenizer, asked + wrong) == pytest.approx(0.5)


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
        model, _ = load_base()
        ll.attach(model, cfg)
        assert added_macs_per_token(model) == expected


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


def test_a_run(tmp_path: Path) -> None:
    seen: list[str] = []
    result = run("pissa", {"r": 2}, 3, TINY, seen.append)
    assert (result.variant, result.rank, result.seed, result.layers) == ("pissa", 2, 3, 28)
    assert len(result.losses) == len(seen) == 10
    assert result.reload_error <= 1e-5
    assert result.trainable == 2 * 4 * (4 * 256 + 3 * 384)
    assert result.init_s > 0
    assert result.forward_ms > 0
    assert result.backward_ms > 0
    assert result.peak_mb > 1
    assert result.versions["lora-lite-svd"] == ll.__version__


def test_a_variant_that_writes_the_base_is_caught(registered: Any, toy: SimpleNamespace) -> None:
    @ll.hookimpl
    def init(layer: nn.Module) -> None:
        layer.weight.data += 1

    toy.init = init
    registered(toy, name="toy")
    with pytest.raises(RuntimeError, match="variant 'toy' has changed the base model's weights"):
        run("toy", {}, 0, TINY, lambda text: None)


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
        run("toy", {}, 0, TINY, lambda text: None)


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    picture = tmp_path / "bench.svg"
    arguments = ["ia3", "--steps", "10", "--seeds", "2", "--quick", "--out", str(out), "--set", "layers=[0, 1]"]
    arguments += ["--picture", str(picture)]
    done = CliRunner().invoke(bench, arguments)
    assert done.exit_code == 0, done.output
    assert "MACs/token" in done.output
    assert "2 runs appended to" in done.output
    drawn = ElementTree.parse(picture).getroot()
    assert "ia3" in "".join(drawn.itertext())
    assert "url(http" not in picture.read_text(encoding="utf-8").replace('"', "")
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["seed"] for line in lines] == [0, 1]
    assert lines[0]["config"]["layers"] == [0, 1]
    assert lines[0]["plan"]["steps"] == 10
    assert len(lines[0]["losses"]) == 10
    assert {"torch", "transformers", "lora-lite-core", "lora-lite-ortho"} <= set(lines[0]["versions"])


def test_mistakes_on_the_command_line(tmp_path: Path) -> None:
    for arguments, message in (
        (["lora", "--set", "r"], "'r' is not FIELD=VALUE"),
        (
            ["lora", "--set", "rank=3", "--out", str(tmp_path / "r")],
            "lora failed: LoRAConfig has no field 'rank'; did you mean 'r'?",
        ),
    ):
        done = CliRunner().invoke(bench, arguments)
        assert done.exit_code != 0
        assert message in done.output


def test_one_broken_variant_does_not_end_the_others(registered: Any, toy: SimpleNamespace, tmp_path: Path) -> None:
    toy.forward = ll.hookimpl(lambda y, params: y + params["lora_x"])
    registered(toy, name="toy")
    done = CliRunner().invoke(bench, ["toy", "ia3_ff", "--quick", "--steps", "10", "--out", str(tmp_path / "r.jsonl")])
    assert done.exit_code == 1
    assert "toy failed: KeyError('lora_x')" in done.output
    assert len((tmp_path / "r.jsonl").read_text(encoding="utf-8").splitlines()) == 1


def test_rows_average_over_seeds_and_rank_by_score() -> None:
    def result(variant: str, test: float) -> SimpleNamespace:
        numbers = dict.fromkeys(
            ("valid", "added_macs_per_token", "forward_ms", "backward_ms", "init_s", "peak_mb", "reload_error"), 0.0
        )
        return SimpleNamespace(variant=variant, rank=None, trainable=5, test=test, test_error=0.01, **numbers)

    table = rows([result("a", 0.5), result("b", 0.9), result("a", 0.7)])  # type: ignore[list-item]
    assert [row[0] for row in table] == ["b", "a"]
    assert table[0][2] == "90.0 ± 1.0"
    assert table[1][2] == "60.0 ± 10.0"
    assert standard_error([result("a", 0.5), result("a", 0.7)]) == pytest.approx(0.1)  # type: ignore[list-item]
