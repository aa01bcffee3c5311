"""One run of the benchmark: attach a variant, train it on the shifted task, score it, save, reload, measure."""

from __future__ import annotations

import hashlib
import math
import platform
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from importlib_metadata import version
from torch import nn

import lora_lite_core as ll

from .base import PACKAGED, encode, exact_match, load_base, loss_of, schedule
from .costs import PeakMemory, added_macs_per_token, step_times
from .tasks import problem, problems

# Learning rates for this small model: of those tried the best on the valid split, or the smaller of two within noise
# (`lora-lite bench VARIANT --lr LR --seed 100`). Variants not listed get
# what their module says (BENCH), or DEFAULT_LR.
LEARNING_RATES = {
    "antipasto": 4e-2,
    "delora": 5e-3,
    "dora": 1e-2,
    "eva": 1e-2,
    "hra": 2e-2,
    "ia3": 4e-2,
    "ia3_ff": 8e-2,
    "lora": 1e-2,
    "lora_xs": 1.6e-2,
    "oft": 8e-3,
    "pissa": 2.5e-3,
    "road": 2e-2,
    "ssvd": 1e-2,
}
DEFAULT_LR = 5e-3
CONFIG_FIELDS: dict[str, dict[str, Any]] = {
    "antipasto": {"r": 64},  # its default of 256 is for layers wider than these
    "ia3_ff": {"target_names": ("down_proj",)},
}


@dataclass(frozen=True)
class Plan:
    """How long and on what a run trains."""

    steps: int = 120  # or what the variant's module says, where own_steps
    batch_size: int = 64
    test_problems: int = 1000
    valid_problems: int = 300
    lr: float | None = None
    own_steps: bool = False
    base: Path = PACKAGED


QUICK = Plan(steps=30, test_problems=200, valid_problems=100)


@dataclass
class Result:
    """One line of results.jsonl."""

    variant: str
    config: dict[str, Any]
    seed: int
    plan: dict[str, Any]
    versions: dict[str, str]
    layers: int = 0
    rank: int | None = None
    lr: float = 0.0
    test: float = math.nan
    test_error: float = math.nan
    valid: float = math.nan
    trainable: int = 0
    added_macs_per_token: float = math.nan
    forward_ms: float = math.nan
    backward_ms: float = math.nan
    init_s: float = math.nan
    train_s: float = math.nan
    peak_mb: float = math.nan
    file_bytes: int = 0
    reload_error: float = math.nan
    losses: list[float] = field(default_factory=list)


def config_for(variant: str, fields: dict[str, Any]) -> ll.AdapterConfig:
    """The variant's own defaults, with the benchmark's few exceptions and the user's fields over them."""
    return ll.LoraLiteConfig(variant=variant, **{**CONFIG_FIELDS.get(variant, {}), **fields})


def plan_for(variant: str, plan: Plan) -> Plan:
    """The plan with the steps that the variant's module asks for, unless the user has said how many."""
    return replace(plan, steps=int(ll.get_variant(variant).bench.get("steps", plan.steps))) if plan.own_steps else plan


def run(variant: str, fields: dict[str, Any], seed: int, plan: Plan, advance: Callable[[str], None]) -> Result:
    """Everything the table says of one variant. `advance` is called once a training step with a short status.

    Raises RuntimeError when the base model was changed or the reloaded adapter computes something else.
    """
    model, tokenizer = load_base(plan.base)
    base_names = set(model.state_dict())
    before = weights_hash(model, base_names)
    cfg = config_for(variant, fields)
    found = ll.get_variant(variant)
    lr = plan.lr or LEARNING_RATES.get(variant) or found.bench.get("lr") or DEFAULT_LR
    result = Result(
        variant,
        cfg.to_dict(),
        seed,
        {**asdict(plan), "base": str(plan.base)},
        versions("lora-lite-core", "lora-lite-bench", "torch", "transformers", found.distribution),
    )
    result.lr, result.rank = lr, getattr(cfg, "r", None)
    rng = random.Random(f"train {seed}")

    def batch() -> dict[str, torch.Tensor]:
        return encode(tokenizer, [problem("shifted", "train", rng) for _ in range(plan.batch_size)])

    calibration = [labelled(batch()) for _ in range(8)]
    start = time.perf_counter()
    try:
        adapter = ll.attach(model, cfg, seed=seed)
    except ll.CalibrationError:  # this variant, so configured, needs data
        start = time.perf_counter()
        adapter = ll.attach(model, cfg, seed=seed, calibration_data=calibration)
    result.init_s = time.perf_counter() - start
    result.layers = len(adapter.targets)
    parameters = list(adapter.parameters())
    result.trainable = sum(p.numel() for p in parameters)
    result.added_macs_per_token = added_macs_per_token(model)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    scheduler = schedule(optimizer, plan.steps)
    ll.follow(model, optimizer)

    def step(data: dict[str, torch.Tensor]) -> float:
        loss = loss_of(model, data)
        (loss + ll.penalty(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    start = time.perf_counter()
    model.train()
    for number in range(plan.steps):
        data = batch()
        if number == 0:
            with PeakMemory() as memory:
                result.losses.append(step(data))
            result.peak_mb = memory.peak / 1e6
        else:
            result.losses.append(step(data))
        scheduler.step()
        advance(f"{variant}, loss {result.losses[-1]:.3f}")
    result.train_s = time.perf_counter() - start
    sample = batch()
    result.forward_ms, result.backward_ms = step_times(lambda: loss_of(model, sample))
    optimizer.zero_grad()

    test = problems("shifted", "test", plan.test_problems, seed=0)
    result.test = exact_match(model, tokenizer, test)
    result.test_error = math.sqrt(result.test * (1 - result.test) / len(test))
    result.valid = exact_match(model, tokenizer, problems("shifted", "valid", plan.valid_problems, seed=0))
    if weights_hash(model, base_names) != before:
        raise RuntimeError(f"variant '{variant}' has changed the base model's weights")
    _round_trip(model, sample, result, plan)
    return result


@torch.no_grad()
def _round_trip(model: nn.Module, sample: dict[str, torch.Tensor], result: Result, plan: Plan) -> None:
    """Save, load onto a fresh base, compare all logits."""
    inputs = {"input_ids": sample["input_ids"], "attention_mask": sample["attention_mask"]}
    expected = model.eval()(**inputs).logits
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        ll.save(model, path)
        result.file_bytes = path.stat().st_size
        fresh, _ = load_base(plan.base)
        ll.load(fresh, path)
    result.reload_error = float((fresh(**inputs).logits - expected).abs().max())
    if not result.reload_error <= 1e-5:
        raise RuntimeError(
            f"variant '{result.variant}' computes something else after save and load: {result.reload_error:.2g} off"
        )


def labelled(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As users give calibration data: what the model takes, with labels where the loss is."""
    labels = batch["input_ids"].where(batch["weights"] > 0, -100)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


def weights_hash(model: nn.Module, names: set[str]) -> str:
    """A hash of the named parameters and buffers, by name and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name in names:
            digest.update(name.encode())
            digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def versions(*names: str) -> dict[str, str]:
    """Of Python and of these distributions; an empty name, of a variant that was registered by hand, is left out."""
    return {"python": platform.python_version(), **{name: version(name) for name in names if name}}
