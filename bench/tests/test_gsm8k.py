"""The task gsm8k on a tiny Qwen3.5 and files of this machine: generation, runs, quantised bases, the command."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from lora_lite_bench.command import bench
from lora_lite_bench.comparing.results import read
from lora_lite_bench.runs.methods import ANCHORS, FROZEN, FULL, config_for
from lora_lite_bench.runs.run import Job, run
from lora_lite_bench.runs.training import Training
from lora_lite_bench.tasks import TaskError, make_task
from lora_lite_bench.tasks.gsm8k import encoding

import lora_lite as ll
from bench.tests.word_problems import problem

pytestmark = pytest.mark.usefixtures("own_cache")
SMALL = {"dtype": "float32", "batch_size": 4, "new_tokens": 12, "length": 96, "valid_count": 4, "test_count": 6}


@pytest.fixture
def task(places: dict[str, str]) -> Any:
    return make_task("gsm8k", {**places, **SMALL})


@pytest.fixture
def job(places: dict[str, str]) -> Job:
    return Job("gsm8k", {**places, **SMALL}, "lora", {"r": 4, "target_names": ("down_proj$",)}, 0, 1e-3, 6)


def test_models_of_the_hub_that_read_pictures_too(places: dict[str, str], tmp_path: Path) -> None:
    """Of Qwen3.5's own checkpoints the language model is taken; one that lacks weights of it is refused."""
    from transformers import AutoConfig, AutoTokenizer, Qwen3_5Config, Qwen3_5ForConditionalGeneration

    text = AutoConfig.from_pretrained(places["model"]).to_dict()
    seen = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    for tied in (True, False):
        config = Qwen3_5Config(
            text_config={**text, "tie_word_embeddings": tied}, vision_config=seen, tie_word_embeddings=True
        )
        whole = Qwen3_5ForConditionalGeneration(config)
        whole.save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(places["model"]).save_pretrained(tmp_path)
        task = make_task("gsm8k", {**places, "model": str(tmp_path), "dtype": "float32"})
        if tied:
            model, _ = task.load()
            theirs = whole.model.language_model.layers[1].mlp.down_proj.weight
            assert torch.equal(model.get_submodule("model.layers.1.mlp.down_proj").weight, theirs)  # type: ignore[arg-type]
            assert type(model).__name__ == "Qwen3_5ForCausalLM"
        else:
            with pytest.raises(TaskError, match="has no lm_head.weight: the language model would begin with random"):
                task.load()


def test_generation_does_not_depend_on_the_others_in_a_batch(task: Any) -> None:
    model, tokenizer = task.load()
    prompts = ["Question: Ann?\nAnswer:", "Question: Ben has 5 pens. How many pens?\nAnswer:"]
    together = encoding.generate(model, tokenizer, prompts, 96, 8)
    assert together == [encoding.generate(model, tokenizer, [one], 96, 8)[0] for one in prompts]
    assert all(together)
    assert len(tokenizer(encoding.generate(model, tokenizer, prompts, 96, 3)[0])["input_ids"]) <= 3


@pytest.mark.parametrize("knobs", [{}, {"checkpointing": True}, {"at_once": 3}], ids=str)
def test_a_run(job: Job, knobs: dict[str, Any]) -> None:
    result = run(replace(job, knobs={**job.knobs, **knobs}))
    whole = run(job)
    assert result.losses == pytest.approx(whole.losses, abs=2e-5)
    assert (result.test, result.valid, result.trainable) == (whole.test, whole.valid, 2 * 4 * (96 + 64))
    assert result.at_once == knobs.get("at_once", 4)
    assert result.reload_error == 0


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantised_base_in_bfloat16(job: Job, quantize: str) -> None:
    """The adapter's tensors are float32 all the same, and the base is not written."""
    task = replace(job, knobs={**job.knobs, "quantize": quantize, "dtype": "bfloat16"})
    model, _ = task.make_task().load()
    assert (
        type(model.get_submodule("model.layers.0.mlp.down_proj")).__name__
        == {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[quantize]
    )
    adapter = ll.attach(model, config_for(task.make_task(), "lora", job.fields))
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    result = run(task)
    assert len(result.losses) == 6
    assert result.reload_error is not None


@pytest.mark.parametrize("method", [FROZEN, "lora"])
def test_a_quantised_base_computes_the_same_without_an_adapter(method: str, job: Job) -> None:
    """The frozen base is not rearranged for AVX512-BF16 while others, that have adapters, are not."""
    knobs = {**job.knobs, "quantize": "nf4", "dtype": "bfloat16"}
    model, _ = (task := replace(job, knobs=knobs).make_task()).load()
    layers = [layer for layer in model.modules() if type(layer).__name__ == "Linear4bit"]
    assert layers
    assert not any(getattr(layer, "support_avx512bf16_for_cpu", False) for layer in layers)
    assert run(replace(job, knobs=knobs, method=method, fields={} if method == FROZEN else job.fields)).test is not None
    assert not task.trains_whole()


def test_generation_is_greedy_whatever_the_model_was_saved_with(task: Any, tmp_path: Path) -> None:
    """Instruct models bring a repetition penalty, which would not let numbers be repeated."""
    shutil.copytree(task.model, tmp_path / "model")
    own = {
        "do_sample": True,
        "temperature": 0.6,
        "repetition_penalty": 50.0,
        "no_repeat_ngram_size": 1,
        "max_length": 4,
    }
    (tmp_path / "model/generation_config.json").write_text(json.dumps(own), encoding="utf-8")
    prompts = ["Question: Ben has 5 pens. How many pens?\nAnswer:"]
    other = replace(task, model=str(tmp_path / "model"))
    plain, theirs = (encoding.generate(*one.load(), prompts, 96, 24) for one in (task, other))
    assert plain == theirs


def test_gates_are_outside_weight_decay(task: Any) -> None:
    model, _ = task.load()
    adapter = ll.attach(model, ll.DoRAConfig(r=2, target_names=("down_proj$",)))
    training = Training(task, model, list(adapter.parameters()), adapted=True, lr=1e-3, steps=4)
    decays = {group["name"]: group["weight_decay"] for group in training.optimizer.param_groups}
    assert decays == {"matrices": 0.1, "B side": 0.1, "gates": 0.0}
    model, _ = task.load()
    whole = Training(task, model, list(model.parameters()), adapted=False, lr=1e-3, steps=4)
    assert [group["weight_decay"] for group in whole.optimizer.param_groups] == [0.1, 0.0]
    assert {p.dim() for p in whole.optimizer.param_groups[1]["params"]} == {1}


def test_the_command(places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the protocol lora-lite: its rates, its layers, its ranks as far as the layers have room; one seed; no sweep."""
    monkeypatch.setattr("lora_lite_bench.report.page.pictures", lambda table: iter(()))
    out = tmp_path / "r.jsonl"
    knobs = [part for name, value in SMALL.items() for part in ("--knob", f"{name}={value}")]
    named = ["--task", "gsm8k", "--model", places["model"], "--data", places["data"], "--out", str(out), "--steps", "8"]
    done = CliRunner().invoke(bench, ["lora", "ia3", "antipasto", *named, *knobs])
    assert done.exit_code == 0, done.output
    for column in ("variant", "test %", "valid %", "trainable", "MACs/token", "fwd ms", "bwd ms", "init s", "peak MB"):
        assert column in done.output
    records = read([out])
    runs = {record.job.method: record for record in records if record.kind == "run"}
    assert {method: (record.job.seed, record.job.lr) for method, record in runs.items()} == {
        "lora": (0, 1e-4), "ia3": (0, 5e-3), "antipasto": (0, 5e-3),
        "(frozen)": (0, 0.0), "(full fine-tuning)": (0, 1e-5), "(head only)": (0, 1e-4),
    }  # fmt: skip
    config = runs["lora"].outcome.config  # type: ignore[union-attr]
    assert (config["r"], config["alpha"], config["target_names"]) == (32, 64, ["down_proj$"])
    assert runs["antipasto"].outcome.rank == 64, "256, cut to the room there is"  # type: ignore[union-attr]
    assert runs["ia3"].outcome.config["target_names"] == ["k_proj$", "v_proj$"]  # type: ignore[union-attr]
    assert {len(record.outcome.losses) for name, record in runs.items() if name not in ANCHORS} == {8}  # type: ignore[union-attr]


@pytest.mark.slow
def test_what_is_learned_is_scored(job: Job) -> None:
    """Full fine-tuning from nothing learns to repeat the number: the generated answers are right."""
    import random

    assert problem(random.Random(0), metamath=True)["response"].endswith("The answer is: 8")
    knobs = {**job.knobs, "batch_size": 16, "new_tokens": 40, "test_count": 10, "valid_count": 12}
    result = run(replace(job, method=FULL, fields={}, lr=3e-3, steps=400, knobs=knobs))
    assert result.test is not None
    assert result.valid is not None
    assert result.test >= 0.8
    assert result.valid >= 0.8
