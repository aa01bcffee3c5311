"""The task gsm8k on a tiny Qwen3.5 and files of this machine: data, encoding, runs, quantised bases, the command."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from lora_lite_bench.command import bench
from lora_lite_bench.methods import ANCHORS, FULL, config_for
from lora_lite_bench.processes import processes
from lora_lite_bench.results import read
from lora_lite_bench.run import Job, run
from lora_lite_bench.tasks import TaskError, make_task, protocol_of, small_task_names, task_names
from lora_lite_bench.tasks.gsm8k import corpus, encoding
from lora_lite_bench.training import Training

import lora_lite as ll
from bench.tests.word_problems import END, problem, write_data, write_model

SMALL = {"dtype": "float32", "batch_size": 4, "new_tokens": 12, "length": 96, "valid_count": 4, "test_count": 6}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("gsm8k")
    return {"model": str(write_model(folder / "model")), "data": str(write_data(folder / "data"))}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def task(places: dict[str, str]) -> Any:
    return make_task("gsm8k", {**places, **SMALL})


@pytest.fixture
def job(places: dict[str, str]) -> Job:
    return Job("gsm8k", {**places, **SMALL}, "lora", {"r": 4, "target_names": ("down_proj$",)}, 0, 1e-3, 6)


@pytest.mark.parametrize("kind", ["json", "parquet", "hub"])
def test_files_of_other_kinds(kind: str, places: dict[str, str], tmp_path: Path) -> None:
    import datasets

    for name in ("metamath/train", "gsm8k/train", "gsm8k/test"):
        rows = datasets.Dataset.from_list(lines(Path(places["data"]) / f"{name}.jsonl"))
        above, _, stem = name.partition("/")
        target = tmp_path / above / ("main" if kind == "hub" else "")
        target.mkdir(parents=True, exist_ok=True)
        if kind == "json":
            (target / f"{stem}.json").write_text(json.dumps(rows.to_list()), encoding="utf-8")
        elif kind == "parquet":
            rows.to_parquet(target / f"{stem}.parquet")
        else:
            for n in range(2):
                rows.shard(2, n, contiguous=True).to_parquet(target / f"{stem}-0000{n}-of-00002.parquet")
    for part in corpus.SOURCES:
        assert corpus.texts(part, str(tmp_path)) == corpus.texts(part, places["data"])


def test_splits(places: dict[str, str], tmp_path: Path) -> None:
    """Long texts are not trained on; "valid" is GSM8K's training set in the order of PEFT's comparison."""
    import numpy as np

    assert [len(corpus.texts(part, places["data"])) for part in corpus.SOURCES] == [64, 12, 10]
    rows = lines(Path(places["data"]) / "gsm8k/train.jsonl")
    np.random.seed(0)
    order = np.arange(12)
    np.random.shuffle(order)
    assert [text.question for text in corpus.texts("valid", places["data"])] == [rows[n]["question"] for n in order]
    folder = write_data(tmp_path)
    with (folder / "metamath/train.jsonl").open("a") as file:
        file.write(json.dumps({"query": "How?", "response": "x" * 1300, "type": "long"}) + "\n")
    assert len(corpus.texts("train", str(folder))) == 64


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda folder: (folder / "gsm8k/test.jsonl").unlink(), r"has no gsm8k/test\.jsonl \(or \.json, \.parquet\)"),
        (lambda folder: (folder / "gsm8k/test.jsonl").write_text('{"q": 1}\n'), "has no column question and no answer; it has q"),
        (lambda folder: (folder / "gsm8k/test.jsonl").write_text("{}}\n"), "cannot be read as jsonl"),
    ],
)  # fmt: skip
def test_data_that_is_not_there(broken: Any, message: str, tmp_path: Path) -> None:
    broken(write_data(tmp_path))
    with pytest.raises(TaskError, match=message):
        corpus.texts("test", str(tmp_path))


def test_no_folder_no_hub_no_model(places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    with pytest.raises(
        TaskError, match=r"--data /no is not a folder\n[\s\S]*DIR/metamath/train.jsonl +query, response"
    ):
        corpus.texts("train", "/no")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TaskError, match=r"openai/gsm8k cannot be had from the hub: [\s\S]*give --data DIR with these"):
        corpus.texts("test", "")
    with pytest.raises(TaskError, match=r"model /no cannot be had: [\s\S]*give --model FOLDER"):
        make_task("gsm8k", {**places, "model": "/no"}).prepare()


def test_packages_that_are_not_there(places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    corpus.texts.cache_clear()
    task = make_task("gsm8k", {**places, "quantize": "nf4"})
    for name, command in (("bitsandbytes", "bitsandbytes"), ("accelerate", "lora-lite-bench[gsm8k]")):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, name, None)
            with pytest.raises(TaskError, match=rf"needs {name}; type: pip install '{re.escape(command)}'"):
                task.prepare()
    corpus.texts.cache_clear()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TaskError, match=r"needs datasets; type: pip install 'lora-lite-bench\[gsm8k\]'"):
        task.prepare()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    processes.cache_clear()
    done = CliRunner().invoke(bench, ["lora", "--task", "gsm8k"])
    processes.cache_clear()
    assert "2 processes need accelerate; type: pip install 'lora-lite-bench[gsm8k]'" in done.output


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


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"quantize": "nf8"}, "quantize='nf8': one of nf4, fp4, int8"),
        ({"prompt": "Q:"}, "has no {query}"),
        ({"answers": "last"}, "answers='last': one of any, stated, strict-match, flexible-extract"),
        ({"trained_on": "question"}, "trained_on='question': answer or all"),
    ],
)
def test_knobs_that_it_refuses(knobs: dict[str, str], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        make_task("gsm8k", knobs)


def test_encoding(task: Any) -> None:
    _, tokenizer = task.load()
    prompts, answers = ["Question: Ann?\nAnswer:", "Question: a longer one, of Ben?\nAnswer:"], [" 5", " 6 pens"]
    batch = encoding.encode(tokenizer, prompts, answers, 96, all_in_loss=False)
    for prompt, answer, ids, mask, labels in zip(prompts, answers, *batch.values(), strict=True):
        assert tokenizer.decode(ids[mask > 0]) == prompt + answer + END
        assert tokenizer.decode(ids[labels != -100]) == answer + END
        assert (ids[labels != -100] == labels[labels != -100]).all()
        assert mask.tolist() == sorted(mask.tolist()), "padded on the left"
    everything = encoding.encode(tokenizer, prompts, answers, 96, all_in_loss=True)
    assert ((everything["labels"] != -100) == (everything["attention_mask"] == 1)).all()
    cut = encoding.encode(tokenizer, prompts, answers, 5, all_in_loss=False)
    assert cut["input_ids"].shape == (2, 5)
    assert (cut["labels"] != -100).sum(1).tolist() == [1, 1], "something to learn is left"
    first = task.part(batch, slice(1))
    assert first["input_ids"].shape[1] == int(batch["attention_mask"][0].sum()), "without the others' padding"


def test_batches(task: Any) -> None:
    _, tokenizer = task.load()

    def first(split: Any, seed: int, count: int = 1) -> list[str]:
        batches = task.batches(tokenizer, split, seed)
        return [text for _ in range(count) for text in tokenizer.batch_decode(next(batches)["input_ids"])]

    assert first("train", 1) == first("train", 1) != first("train", 2)
    epoch = [text.strip(END) for text in first("train", 1, 16)]
    assert sorted(epoch) == sorted(
        f"{task.prompt.replace('{query}', t.question)} {t.answer}" for t in corpus.texts("train", task.data)
    )
    valid, test = list(task.batches(tokenizer, "valid", 0)), list(task.batches(tokenizer, "test", 0))
    assert ([len(b["prompts"]) for b in valid], [len(b["prompts"]) for b in test]) == ([4], [6])
    assert valid[0]["prompts"][0].endswith("Think step by step.\nAnswer:")
    assert not list(task.batches(tokenizer, "own", 0))


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


def test_protocols_by_name() -> None:
    peft = protocol_of("gsm8k", "peft", {})
    assert peft is not None
    task: Any = make_task("gsm8k", peft.knobs)
    assert (task.model, task.steps, task.batch_size, task.length) == ("meta-llama/Llama-3.2-3B", 5000, 4, 768)
    assert (task.weight_decay, task.schedule, task.new_tokens, task.dtype) == (0.1, "cosine", 300, "bfloat16")
    known = frozenset(("r", "alpha", "target_names"))
    assert peft.fields_of("lora", known) == {"r": 32, "alpha": 64, "target_names": ("q_proj$", "v_proj$")}
    ours = protocol_of("gsm8k", "", {})
    assert ours is protocol_of("gsm8k", "lora-lite", {})
    assert ours is not None
    task = make_task("gsm8k", ours.knobs)
    assert (task.model, task.steps, task.batch_size) == ("Qwen/Qwen3.5-0.8B-Base", 2500, 8)
    assert task.prompt == "Question: {query} Think step by step.\nAnswer:"
    assert ours.fields_of("pissa", known) == {"r": 32, "alpha": 32, "target_names": ("down_proj$",)}
    assert protocol_of("shifted", "", {}) is None
    with pytest.raises(TaskError, match="has no protocol 'pefd'; did you mean 'peft'.*or a folder"):
        protocol_of("gsm8k", "pefd", {})
    with pytest.raises(TaskError, match="task 'shifted' has no protocol 'peft'; it has no protocols"):
        protocol_of("shifted", "peft", {})
    with pytest.raises(TaskError, match="the task reads no protocols from folders"):
        protocol_of("shifted", str(Path(__file__).parent), {})


def test_full_comparisons_leave_it_to_those_who_ask_for_it() -> None:
    assert set(task_names()) - set(small_task_names()) == {"gsm8k"}


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
