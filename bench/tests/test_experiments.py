"""Experiments of PEFT's method comparison, as its folders have them, read as protocols."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
from click.testing import CliRunner
from lora_lite_bench.command import bench
from lora_lite_bench.comparing.results import read
from lora_lite_bench.tasks import TaskError, make_task, protocol_of
from lora_lite_bench.tasks.gsm8k.experiment import training_knobs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's and transformers' own

DEFAULTS: dict[str, Any] = {
    "model_id": "meta-llama/Llama-3.2-3B",
    "dtype": "bfloat16",
    "max_seq_length": 768,
    "batch_size": 4,
    "batch_size_eval": 50,
    "max_steps": 5000,
    "eval_steps": 250,
    "compile": False,
    "use_gc": False,
    "query_template": "Question: {query} Think step by step.\nAnswer:",
    "seed": 0,
    "grad_norm_clip": 1.0,
    "optimizer_type": "AdamW",
    "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1},
    "lr_scheduler": "cosine",
    "use_amp": False,
    "autocast_adapter_dtype": True,
    "generation_kwargs": {"max_length": 800, "max_new_tokens": 300},
    "attn_implementation": None,
    "init_kv_cache_prefix": None,
}


def experiment(folder: Path, cfg: peft.PeftConfig, training: dict[str, Any] | None = None) -> str:
    """experiments/METHOD/NAME below default_training_params.json, as in PEFT's repository."""
    place = folder / "experiments" / "method" / "llama-3.2-3B"
    cfg.save_pretrained(str(place))
    (folder / "default_training_params.json").write_text(json.dumps(DEFAULTS), encoding="utf-8")
    if training is not None:
        (place / "training_params.json").write_text(json.dumps(training), encoding="utf-8")
    return str(place)


@pytest.mark.parametrize(
    ("cfg", "method", "fields"),
    [
        (peft.LoraConfig(r=4, lora_alpha=8), "lora", {"r": 4, "alpha": 8}),
        (peft.LoraConfig(r=4, lora_alpha=4, use_rslora=True), "lora", {"r": 4, "alpha": 4, "rslora": True}),
        (peft.LoraConfig(r=4, lora_alpha=8, use_dora=True), "dora", {"r": 4, "alpha": 8}),
        (peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa"), "pissa", {"r": 4, "alpha": 8}),
        (peft.LoraConfig(r=4, init_lora_weights="gaussian"), "lora", {"r": 4, "alpha": 8, "init": "gaussian"}),
        (peft.HRAConfig(r=4), "hra", {"r": 4}),
        (peft.IA3Config(feedforward_modules=[]), "ia3", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config(cfg: Any, method: str, fields: dict[str, Any], places: dict[str, str], tmp_path: Path) -> None:
    cfg.target_modules = {"q_proj", "v_proj"}
    cfg.task_type = "CAUSAL_LM"
    place = experiment(tmp_path, cfg, {"optimizer_kwargs": {"lr": 3e-4, "weight_decay": 0.0}, "max_steps": 100})
    protocol = protocol_of("gsm8k", place, places)
    assert protocol is not None
    assert (protocol.methods, protocol.rate(method), protocol.seed, protocol.seeds) == ((method,), 3e-4, 0, 1)
    found = dict(protocol.special[method])
    assert found.pop("target_names") == [r"(^|\.)q_proj$", r"(^|\.)v_proj$"]
    assert found.pop("exclude_names") == []
    assert found == fields
    task: Any = make_task("gsm8k", protocol.knobs)
    assert (task.model, task.steps, task.weight_decay) == ("meta-llama/Llama-3.2-3B", 100, 0.0)
    assert (task.length, task.new_tokens, task.scored_at_once, task.answers) == (768, 300, 50, "stated")


@pytest.mark.parametrize(
    ("changes", "knobs"),
    [
        ({"dtype": "int8"}, {"quantize": "int8"}),
        ({"dtype": "int4"}, {"quantize": "fp4"}),
        ({"dtype": "float32"}, {"dtype": "float32"}),
        ({"lr_scheduler": None}, {"schedule": "constant"}),
        ({"use_gc": True}, {"checkpointing": True}),
        ({"generation_kwargs": {"cache_implementation": "static", "max_length": 700}}, {"new_tokens": 700}),
    ],
)
def test_training_parameters(changes: dict[str, Any], knobs: dict[str, Any]) -> None:
    found = training_knobs({**DEFAULTS, **changes})
    assert {name: found[name] for name in knobs} == knobs
    make_task("gsm8k", found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer_type": "lora-fa"}, "optimizer_type='lora-fa' has no counterpart in task 'gsm8k'"),
        ({"optimizer_kwargs": {"lr": 1e-4, "betas": [0.9, 0.9]}}, r"optimizer_kwargs\.betas=\[0\.9, 0\.9\] has"),
        ({"use_amp": True}, "use_amp=True"),
        ({"generation_kwargs": {"do_sample": True}}, "generation_kwargs.do_sample=True"),
        ({"something": 3}, "something=3 has no counterpart.*take it out, or use --protocol peft"),
    ],
)
def test_training_parameters_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        training_knobs({**DEFAULTS, **changes})


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"optimizer_kwargs": {"lr": None}}, r"optimizer_kwargs\.lr=None: a number above 0 is needed"),
        ({"optimizer_kwargs": {"lr": -1e-4}}, r"optimizer_kwargs\.lr=-0\.0001: a number above 0"),
        ({"optimizer_kwargs": ["lr"]}, r"optimizer_kwargs=\['lr'\]: a JSON object is needed"),
        ({"seed": None}, "seed=None: a number"),
        ({"dtype": "nf4"}, "training_params.json, as knobs of the task: .*dtype=nf4: a dtype of torch"),
        ({"max_steps": "8"}, "steps=8: a whole number is needed"),
        ({"query_template": "Q: {q}"}, "has no {query}, the place of the question"),
    ],
)
def test_values_that_are_refused(training: Any, message: str, places: dict[str, str], tmp_path: Path) -> None:
    cfg = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    place = experiment(tmp_path, cfg, training)
    with pytest.raises(TaskError, match=message):
        protocol_of("gsm8k", place, places)


def test_null_is_no_setting(places: dict[str, str], tmp_path: Path) -> None:
    cfg = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    place = experiment(tmp_path, cfg, {"optimizer_kwargs": None, "generation_kwargs": None})
    protocol = protocol_of("gsm8k", place, places)
    assert protocol is not None
    assert (protocol.rate("lora"), protocol.knobs["trained_on"]) == (1e-4, "all")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alfa": 64}, "the installed PEFT has no lora_alfa of LORA; did you mean 'lora_alpha'.*take it out"),
        ({"peft_type": "LORAX"}, "peft_type='LORAX' is no method of PEFT; did you mean 'LORA'"),
        ({"peft_type": None}, "peft_type=None is no method of PEFT"),
        ({"new": None}, ""),
    ],
)
def test_fields_that_peft_would_drop(changes: Any, message: str, places: dict[str, str], tmp_path: Path) -> None:
    """A setting with a slip in its name was dropped, with a warning of PEFT's alone; null of a newer PEFT says nothing."""
    cfg = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    place = Path(experiment(tmp_path, cfg))
    given = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
    (place / "adapter_config.json").write_text(json.dumps({**given, **changes}), encoding="utf-8")
    if message:
        with pytest.raises(TaskError, match=message):
            protocol_of("gsm8k", str(place), places)
    else:
        assert protocol_of("gsm8k", str(place), places)


def test_folders_that_are_refused(places: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"adapter_config\.json cannot be read: FileNotFoundError"):
        protocol_of("gsm8k", str(tmp_path), places)
    tokens = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    with pytest.raises(
        TaskError, match="no counterpart here: ValueError: PROMPT_TUNING adds tokens, and adapts no layer"
    ):
        protocol_of("gsm8k", experiment(tmp_path, tokens), places)
    with pytest.raises(TaskError, match="task 'gsm8k' has no knob 'stepz'; did you mean 'steps'"):
        protocol_of("gsm8k", experiment(tmp_path, tokens), {**places, "stepz": 3})
    cfg = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights="corda")
    with pytest.raises(TaskError, match=r"adapter_config\.json has no counterpart here"):
        protocol_of("gsm8k", experiment(tmp_path, cfg), places)
    cfg = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", rank_pattern={"q_proj": 2})
    with pytest.raises(TaskError, match="has settings of single layers, as rank_pattern; take them out"):
        protocol_of("gsm8k", experiment(tmp_path, cfg), places)
    gates = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    with pytest.raises(TaskError, match="is ia3(_ff)? and ia3(_ff)? here, two adapters"):
        protocol_of("gsm8k", experiment(tmp_path, gates), places)


def test_a_start_from_the_weight_is_a_method_here(places: dict[str, str], tmp_path: Path) -> None:
    cfg = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights="olora")
    protocol = protocol_of("gsm8k", experiment(tmp_path, cfg), places)
    assert protocol is not None
    assert protocol.methods == ("olora",)
    assert protocol.special["olora"]["r"] == 4


def test_the_command(places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder says what is compared; what is named beside it goes over it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("lora_lite_bench.report.page.pictures", lambda table: iter(()))
    cfg = peft.LoraConfig(r=40, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    place = experiment(tmp_path, cfg, {"seed": 3, "optimizer_kwargs": {"lr": 2e-4, "weight_decay": 0.1}})
    out = tmp_path / "r.jsonl"
    named = ["--task", "gsm8k", "--model", places["model"], "--data", places["data"], "--out", str(out)]
    done = CliRunner().invoke(
        bench, [*named, "--protocol", place, "--no-anchors", "--quick", "--steps", "8", "--seeds", "1"]
    )
    assert done.exit_code == 0, done.output
    (run,) = [record for record in read([out]) if record.kind == "run"]
    assert (run.job.method, run.job.seed, run.job.lr, run.job.steps) == ("lora", 3, 2e-4, 8)
    assert run.outcome.config["alpha"] == 8  # type: ignore[union-attr]
    assert run.outcome.rank == 40, "of layers 64 → 32: a rank that is asked for is not cut"  # type: ignore[union-attr]
    assert run.outcome.layers == 2  # type: ignore[union-attr]
