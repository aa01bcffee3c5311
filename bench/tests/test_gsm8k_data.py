"""The task gsm8k: its data, its tokens, its protocols, and what it says of things that are not there."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from lora_lite_bench.command import bench
from lora_lite_bench.machine.processes import processes
from lora_lite_bench.tasks import TaskError, make_task, protocol_of, small_task_names, task_names
from lora_lite_bench.tasks.gsm8k import corpus, encoding

import lora_lite as ll
from bench.tests.word_problems import END, write_data, write_model

pytestmark = pytest.mark.usefixtures("own_cache")
SMALL = {"dtype": "float32", "batch_size": 4, "new_tokens": 12, "length": 96, "valid_count": 4, "test_count": 6}


@pytest.fixture
def task(places: dict[str, str]) -> Any:
    return make_task("gsm8k", {**places, **SMALL})


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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
        (lambda folder: (folder / "gsm8k/test.jsonl").unlink(), r"has no gsm8k/test\.jsonl \(or \.json, \.parquet; with \.gz, too\); it has gsm8k/train\.jsonl"),
        (lambda folder: (folder / "gsm8k/test.jsonl").write_text('{"q": 1}\n'), "has no column question and no answer; it has q"),
        (lambda folder: (folder / "gsm8k/test.jsonl").write_text("{}}\n"), r"gsm8k: test\.jsonl cannot be read: .*JSON parse error[\s\S]*one JSON object a line"),
    ],
)  # fmt: skip
def test_data_that_is_not_there(broken: Any, message: str, tmp_path: Path) -> None:
    broken(write_data(tmp_path))
    with pytest.raises(TaskError, match=message):
        corpus.texts("test", str(tmp_path))


@pytest.mark.parametrize("damage", ["tokenizer", "shard", "half a shard"])
def test_models_that_are_not_whole(damage: str, places: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(places["model"], folder)
    weights = folder / "model.safetensors"
    if damage == "tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    elif damage == "shard":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:5000])
    message = r"model .* cannot be loaded: [\s\S]*all that save_pretrained writes|knows no words: its files"
    with pytest.raises(TaskError, match=message):
        make_task("gsm8k", {**places, "model": str(folder)}).load()


def test_a_tokenizer_of_another_model(places: dict[str, str], tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", vocab_size=100)
    with pytest.raises(
        TaskError, match=r"tokenizer of .* has \d+ tokens, the model's embedding 100: they are not of one"
    ):
        make_task("gsm8k", {**places, "model": str(folder)}).load()


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
    with pytest.raises(
        TaskError, match=r"model /no cannot be loaded, and no folder of that name is here: [\s\S]*give --model FOLDER"
    ):
        make_task("gsm8k", {**places, "model": "/no"}).prepare()


def test_packages_that_are_not_there(places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    corpus.read.cache_clear()
    task = make_task("gsm8k", {**places, "quantize": "nf4"})
    for name, command in (("bitsandbytes", "bitsandbytes"), ("accelerate", "lora-lite-bench[gsm8k]")):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, name, None)
            with pytest.raises(TaskError, match=rf"needs {name}; type: pip install '{re.escape(command)}'"):
                task.prepare()
    corpus.read.cache_clear()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TaskError, match=r"needs datasets; type: pip install 'lora-lite-bench\[gsm8k\]'"):
        task.prepare()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    processes.cache_clear()
    done = CliRunner().invoke(bench, ["lora", "--task", "gsm8k"])
    processes.cache_clear()
    assert "2 processes need accelerate; type: pip install 'lora-lite-bench[gsm8k]'" in done.output


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"quantize": "nf8"}, "quantize='nf8': one of nf4, fp4, int8"),
        ({"prompt": "Q:"}, "has no {query}"),
        ({"answers": "last"}, "answers='last': one of any, stated, strict-match, flexible-extract"),
        ({"dtype": "bf16"}, "--knob dtype=bf16: a dtype of torch; did you mean 'bfloat16'"),
        ({"dtype": "load"}, "--knob dtype=load: a dtype of torch"),
        ({"steps": "abc"}, "--knob steps=abc: a whole number is needed"),
        ({"steps": 0}, "--knob steps=0: at least 1"),
        ({"test_count": -3}, "test_count=-3: at least 1"),
        ({"schedule": "linear"}, "--knob schedule=linear: one of cosine, constant"),
        ({"checkpointing": "yes"}, "--knob checkpointing=yes: true or false is needed"),
        ({"clip": True}, "--knob clip=True: a number is needed"),
        ({"prompt": 5}, "--knob prompt=5: text is needed; for the text, --knob prompt='\"5\"'"),
        ({"trained_on": "question"}, "--knob trained_on=question: one of answer, all"),
    ],
)
def test_knobs_that_it_refuses(knobs: dict[str, Any], message: str) -> None:
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
    assert (cut["labels"] != -100).sum(1).tolist() == [0, 0], "the question's last token is no answer"
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
    assert set(ours.methods) < set(peft.methods) <= {info.name for info in ll.list_variants()}
    assert protocol_of("shifted", "", {}) is None
    with pytest.raises(TaskError, match="has no protocol 'pefd'; did you mean 'peft'.*or a folder"):
        protocol_of("gsm8k", "pefd", {})
    with pytest.raises(TaskError, match="task 'shifted' has no protocol 'peft'; it has no protocols"):
        protocol_of("shifted", "peft", {})
    with pytest.raises(TaskError, match="the task reads no protocols from folders"):
        protocol_of("shifted", str(Path(__file__).parent), {})


def test_full_comparisons_leave_it_to_those_who_ask_for_it() -> None:
    assert set(task_names()) - set(small_task_names()) == {"gsm8k"}
