"""One run: put a method on the base, train it on a task, score it, save, reload, compare."""

from __future__ import annotations

import copy
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from importlib_metadata import version
from torch import nn

import lora_lite_core as ll

from ..tasks import Batch, Split, Task, make_task
from ..tasks.contents import contents
from ..tasks.lookup import source_of
from .methods import ANCHORS, anchor_parameters, attach, config_for, source_hash
from .model_state import spectrum, weights_hash
from .scoring import mean, scores, valid_loss
from .training import Training, on_device

CALIBRATION_BATCHES = 8
SCORED: tuple[Split, ...] = ("valid", "test", "own")
COMPARED = 8  # examples whose outputs are compared after save and load
RELOAD_LIMIT = 1e-5  # largest difference of an output after save and load, in float32


@dataclass(frozen=True)
class Job:
    """What a run is made from, and nothing else: the same job gives the same numbers.

    method  a variant or one of the anchors; `file` is the module's, where it is one that was named by its path
    steps   of this run; a run in which `whole` is true is scored on the test split, saved and reloaded, too
    column  "defaults", or "matched": a rank was chosen for as many parameters as the reference's
    label   what the tables call it: the method, with the fields that the user has set
    own_steps  whether the steps are the method's own (BENCH), not those of the others
    """

    task: str
    knobs: dict[str, Any]
    method: str
    fields: dict[str, Any]
    seed: int
    lr: float
    steps: int
    whole: bool = True
    column: str = "defaults"
    label: str = ""
    file: str = ""
    own_steps: bool = False

    def make_task(self) -> Task:
        return make_task(self.task, self.knobs)

    def key(self) -> dict[str, Any]:
        """What a result is found again by: the job, the code of its task and its method, and what the task reads."""
        spec = asdict(self)
        del spec["file"], spec["column"], spec["label"], spec["own_steps"]
        read = contents(self.make_task().files())
        source = source_hash(*self._task_files(), *self._method_files())
        return {**spec, "source": source, **({"contents": read} if read else {})}

    def code(self) -> tuple[str, str]:
        """Hashes of the task's code, with what it reads, and of the method's, "" of an anchor's: results of other code
        are others."""
        files, read = self._method_files(), contents(self.make_task().files())
        task = source_hash(*self._task_files())
        return f"{task}-{read}" if read else task, source_hash(*files) if files else ""

    def _task_files(self) -> list[Path | None]:
        return [source_of(source) for source in self.make_task().sources()]

    def _method_files(self) -> list[Path | None]:
        return [] if self.method in ANCHORS else [source_of(variant_of(self).Config)]


@dataclass
class Result:
    """One line of the results file, less what every line has (see results.py).

    examples  how many were scored, of "valid" and of "test"
    notes     what is to be known of its data: see `Task.notes`
    """

    config: dict[str, Any] = field(default_factory=dict)
    rank: int | None = None
    layers: int = 0
    trainable: int = 0
    test: float | None = None
    valid: float | None = None
    valid_loss: float | None = None
    own: float | None = None
    examples: dict[str, int] = field(default_factory=dict)
    file_bytes: int | None = None
    reload_error: float | None = None
    init_s: float = 0.0
    train_s: float = 0.0
    at_once: int = 0
    stopped: str = ""
    notes: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    spectrum: dict[str, dict[str, list[float]]] = field(default_factory=dict)


def variant_of(job: Job) -> Any:
    """The variant of a job, whose file is run where it has not been in this process."""
    if job.file and job.method not in _run_files:
        _run_files.add(ll.register(job.file).name)
    return ll.get_variant(job.method)


_run_files: set[str] = set()


_pristine = lru_cache(maxsize=1)(lambda task: task.load())


def fresh(task: Task) -> tuple[nn.Module, Any]:
    """A copy of the task's model, which is read from disk once a process."""
    model, processor = _pristine(task)
    return copy.deepcopy(model), processor


def run(job: Job, place: Path | None = None, advance: Callable[[], None] = lambda: None) -> Result:
    """Everything that the tables say of one run except what it costs. `advance` is called once a training step.

    place  a folder for states to go on from, of a task whose recipe keeps some; what is there is gone on from

    Raises RuntimeError when a variant has changed the base's weights, or computes something else after save and load.
    """
    task = job.make_task()
    result = Result(notes=list(task.notes(job.seed, job.steps)))
    model, processor = fresh(task)
    torch.manual_seed(job.seed)  # of dropout
    parameters = put(job, task, model, processor, result)
    result.trainable = sum(p.numel() for p in parameters)
    if parameters:
        _train(job, task, model, parameters, processor, result, place, advance)
    if result.stopped:
        return result
    if job.method not in ANCHORS:
        _check_base(job, model, _pristine(task)[0])
    result.valid_loss = valid_loss(task, model, processor)
    if job.whole:
        found = {split: scores(task, model, processor, split) for split in SCORED}
        result.valid, result.test, result.own = map(mean, found.values())
        result.examples = {split: len(found[split]) for split in ("valid", "test")}
        if job.method in ANCHORS:
            trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
            result.file_bytes = len(safetensors.torch.save(trained)) if trained else 0
        else:
            _round_trip(job, task, model, next(iter(task.batches(processor, "valid", 0))), result)
            result.spectrum = dict(spectrum(ll.adapters(model)["default"]))
    return result


def _train(
    job: Job,
    task: Task,
    model: nn.Module,
    parameters: list[nn.Parameter],
    processor: Any,
    result: Result,
    place: Path | None,
    advance: Callable[[], None],
) -> None:
    adapted = job.method not in ANCHORS
    training = Training(task, model, parameters, adapted=adapted, lr=job.lr, steps=job.steps, place=place)
    training.carry_out(processor, job.seed, advance)
    result.losses, result.train_s, result.stopped = training.losses, training.seconds, training.stopped
    result.at_once = training.at_once.size


def _check_base(job: Job, model: nn.Module, pristine: nn.Module) -> None:
    """Apart from modules that are trained whole, which are copies under the names of the base's."""
    names = set(pristine.state_dict()) - set(ll.adapters(model)["default"].record.whole)
    if weights_hash(model, names) != weights_hash(pristine, names):
        raise RuntimeError(f"variant '{job.method}' has changed the base model's weights")


def put(job: Job, task: Task, model: nn.Module, processor: Any, result: Result) -> list[nn.Parameter]:
    """The method on the model; what it trains."""
    if job.method in ANCHORS:
        return list(anchor_parameters(model, job.method, task.head()).values())
    variant_of(job)
    cfg = config_for(task, job.method, job.fields)
    data = on_device(calibration(task, processor, job.seed), model)
    start = time.perf_counter()
    adapter = attach(model, cfg, job.seed, data)
    result.init_s = time.perf_counter() - start
    result.config, result.rank, result.layers = cfg.to_dict(), getattr(cfg, "r", None), len(adapter.targets)
    return list(adapter.parameters())


def calibration(task: Task, processor: Any, seed: int) -> list[dict[str, Any]]:
    """As users give calibration data: what the model takes, with labels."""
    batches = task.batches(processor, "train", seed)
    return [task.inputs(next(batches)) for _ in range(CALIBRATION_BATCHES)]


@torch.no_grad()
def _round_trip(job: Job, task: Task, model: nn.Module, batch: Batch, result: Result) -> None:
    """Save, load onto a fresh base, compare the outputs of some examples."""
    inputs = task.inputs(on_device(task.part(batch, slice(COMPARED)), model))
    expected = outputs(model.eval(), inputs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        ll.save(model, path)
        result.file_bytes = path.stat().st_size
        again, _ = fresh(task)
        ll.load(again, path)
    result.reload_error = float((outputs(again, inputs) - expected).abs().max())
    limit = RELOAD_LIMIT * torch.finfo(task.torch_dtype).eps / torch.finfo(torch.float32).eps
    if not result.reload_error <= limit:
        raise RuntimeError(
            f"variant '{job.method}' computes something else after save and load: {result.reload_error:.2g} off"
        )


def outputs(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """The logits of a model of transformers, or the tensor that another gives."""
    found = model(**inputs)
    return found if isinstance(found, torch.Tensor) else found.logits


def versions(*names: str) -> dict[str, str]:
    """Of Python and of these distributions; an empty name, of a variant that was registered by hand, is left out."""
    return {"python": platform.python_version(), **{name: version(name) for name in names if name}}
