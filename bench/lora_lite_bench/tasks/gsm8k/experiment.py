"""Experiments of PEFT's method comparison, read as protocols: a folder with adapter_config.json, perhaps with
training_params.json, under the default_training_params.json of a folder above."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

import lora_lite_core as ll
from lora_lite_core.contract.errors import did_you_mean, listed
from lora_lite_core.contract.text import plain, told

from ..interface import Protocol, Task
from ..lookup import TaskError
from .protocols import PEFT

ADAPTER, TRAINING, DEFAULTS = "adapter_config.json", "training_params.json", "default_training_params.json"
KNOBS = {
    "model_id": "model",
    "max_seq_length": "length",
    "batch_size": "batch_size",
    "batch_size_eval": "scored_at_once",
    "max_steps": "steps",
    "grad_norm_clip": "clip",
    "use_gc": "checkpointing",
    "query_template": "prompt",
}
QUANTIZED = {"int4": "fp4", "int8": "int8"}
WITHOUT_EFFECT = ("eval_steps", "compile", "attn_implementation")  # on the scores at the end
ONLY: Mapping[str, Any] = {"optimizer_type": "AdamW", "use_amp": False, "init_kv_cache_prefix": None}
VARIANTS = ("pissa", "eva")  # that PEFT calls a start of LoRA
STARTS = ("gaussian", "orthogonal")  # that our LoRA calls a start, too


def read_experiment(folder: Path, make_task: Callable[[dict[str, Any]], Task]) -> Protocol:
    """The experiment in a folder, with its method's config as ours has it.

    make_task  a task with these knobs, whose model says which layers PEFT's config selects

    Raises TaskError for settings that have no counterpart here, with their names: none is dropped. The adapter starts
    as ours does, from our seed: PEFT's random numbers are not repeated.
    """
    training = _json(folder / DEFAULTS, needed=False)
    for above in folder.resolve().parents:
        if (above / DEFAULTS).exists():
            training = _json(above / DEFAULTS)
            break
    training |= _json(folder / TRAINING, needed=False)
    knobs = {**PEFT.knobs, **training_knobs(training)}
    lr = _number(_object(training, "optimizer_kwargs").get("lr", PEFT.lr), "optimizer_kwargs.lr", above=0)
    seed = _number(training.get("seed", 0), "seed")
    try:
        task = make_task(knobs)
    except TaskError as error:
        raise TaskError(f"{TRAINING}, as knobs of the task: {error}") from error
    model, _ = task.load()
    method, fields = adapter_fields(folder, model)
    if training.get("autocast_adapter_dtype") is False:
        fields["dtype"] = knobs.get("dtype", "bfloat16")
    return Protocol(
        knobs=knobs,
        fields={name: fields[name] for name in ("target_names", "exclude_names") if name in fields},
        special={method: fields},
        lr=lr,
        rates={},
        methods=(method,),
        seed=int(seed),
    )


def training_knobs(training: Mapping[str, Any]) -> dict[str, Any]:
    """What PEFT calls training parameters, as knobs of the task. Raises TaskError."""
    left = dict(training)
    knobs = {knob: left.pop(name) for name, knob in KNOBS.items() if name in left}
    if (dtype := left.pop("dtype", None)) is not None:
        knobs |= {"quantize": QUANTIZED[dtype]} if dtype in QUANTIZED else {"dtype": dtype}
    optimizer = _object(left, "optimizer_kwargs")
    optimizer.pop("lr", None)
    if "weight_decay" in optimizer:
        knobs["weight_decay"] = optimizer.pop("weight_decay")
    if "lr_scheduler" in left:
        knobs["schedule"] = left.pop("lr_scheduler") or "constant"
    generation = _object(left, "generation_kwargs")
    generation.pop("cache_implementation", None)
    longest = generation.pop("max_length", None)
    if (new := generation.pop("max_new_tokens", None) or longest) is not None:
        knobs["new_tokens"] = new
    for name in ("seed", "autocast_adapter_dtype", "optimizer_kwargs", "generation_kwargs", *WITHOUT_EFFECT):
        left.pop(name, None)
    refused = {name: value for name, value in left.items() if name not in ONLY or value != ONLY[name]}
    refused |= {f"optimizer_kwargs.{name}": value for name, value in optimizer.items()}
    refused |= {f"generation_kwargs.{name}": value for name, value in generation.items()}
    if refused:
        stated = ", ".join(f"{name}={plain(repr(value))}" for name, value in refused.items())
        raise TaskError(f"{TRAINING}: {stated} has no counterpart in task 'gsm8k'; take it out, or use --protocol peft")
    return knobs


def adapter_fields(folder: Path, model: nn.Module) -> tuple[str, dict[str, Any]]:
    """The variant of a PEFT config and the fields that are not at their defaults: PEFT makes the adapter, and what it
    saves is imported. `model` has an adapter afterwards. Raises TaskError."""
    try:
        import peft
    except ImportError as error:
        raise TaskError("PEFT's experiments are read by PEFT; type: pip install peft") from error
    given = _json(folder / ADAPTER)
    _check_fields(given, folder / ADAPTER)
    start = given.get("init_lora_weights", True)
    if start in VARIANTS:
        given["init_lora_weights"] = True
    try:
        cfg: Any = peft.PeftConfig.from_peft_type(**given)
        if cfg.is_prompt_learning:
            raise ValueError(f"{given['peft_type']} adds tokens, and adapts no layer")
        made: Any = peft.get_peft_model(model, cfg)  # pyright: ignore[reportArgumentType]
        with tempfile.TemporaryDirectory() as place:
            made.save_pretrained(place)
            ll.import_peft(made.unload(), place)
    except Exception as error:
        raise TaskError(f"{plain(folder / ADAPTER)} has no counterpart here: {told(error)}") from error
    found = list(ll.adapters(model).values())
    if len(found) > 1:
        names = " and ".join(adapter.cfg.variant for adapter in found)
        raise TaskError(f"{plain(folder / ADAPTER)} is {names} here, two adapters: compare them one by one")
    (adapter,) = found
    if any(target.cfg != adapter.cfg for target in adapter.layers().values()):
        raise TaskError(f"{plain(folder / ADAPTER)} has settings of single layers, as rank_pattern; take them out")
    method = start if start in VARIANTS else adapter.cfg.variant
    fields = {**adapter.cfg.to_dict(), "target_names": _patterns(model, list(adapter.layers()))}
    return method, _beside_defaults(method, {**fields, **({"init": start} if start in STARTS else {})})


def _check_fields(given: Mapping[str, Any], path: Path) -> None:
    """PEFT drops fields that it does not know with a warning; one that says something is refused. Raises TaskError."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kinds = {str(one.value): config for one, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind, known = given.get("peft_type"), sorted(kinds)
    if kind not in known:
        near = did_you_mean(str(kind), known)
        raise TaskError(
            f"{plain(path)}: peft_type={plain(repr(kind))} is no method of PEFT{near}; methods: {listed(known)}"
        )
    names = [field.name for field in dataclasses.fields(kinds[str(kind)])]
    for name in given:
        if name not in names and given[name]:
            raise TaskError(
                f"{plain(path)}: the installed PEFT has no {plain(name)} of {kind}{did_you_mean(name, names)}; "
                "take it out, or type: pip install -U peft"
            )


def _patterns(model: nn.Module, names: list[str]) -> list[str]:
    """Regular expressions that select these layers of the model and no others: of their last names where that is so."""
    last = sorted({name.rpartition(".")[2] for name in names})
    called = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    exact = called == set(names)
    return [rf"(^|\.){re.escape(one)}$" for one in last] if exact else [f"^{re.escape(name)}$" for name in names]


def _beside_defaults(method: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    default = ll.LoraLiteConfig(variant=method).to_dict()
    known = default.keys() - {"variant"}
    return {name: value for name, value in fields.items() if name in known and value != default[name]}


def _object(training: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A copy of the settings under this name; null is none. Raises TaskError."""
    found = training.get(name) or {}
    if not isinstance(found, dict):
        raise TaskError(f"{TRAINING}: {name}={plain(repr(found))}: a JSON object is needed")
    return dict(found)


def _number(value: Any, name: str, *, above: float = -1) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = float("nan")
    if not above < found < float("inf"):
        raise TaskError(f"{TRAINING}: {name}={plain(repr(value))}: a number above {above:g} is needed")
    return found


def _json(path: Path, *, needed: bool = True) -> dict[str, Any]:
    if not needed and not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TaskError(f"{plain(path)} cannot be read: {told(error)}") from error
    if not isinstance(found, dict):
        raise TaskError(f"{plain(path)} is no JSON object")
    return found
