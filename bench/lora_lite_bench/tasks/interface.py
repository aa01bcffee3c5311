"""What a task of `lora-lite bench` is: a model, batches, a loss, and what counts as right."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .contents import model_files

Split = Literal["train", "valid", "test", "own"]
Batch = dict[str, Any]  # tensors by name, first dimension the examples; other values may ride along for `correct`


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a task is trained: AdamW at the rate of the job, warmed up over the first tenth of the steps.

    weight_decay  of matrices; tensors of one dimension (gates, magnitudes, biases) get none
    clip          the largest norm of all gradients together; 0 is no limit
    schedule      after the warm-up: "cosine" to zero, or "constant" (then without warm-up)
    at_once       examples that go through the model together at most: a larger batch is accumulated. 0 is no limit.
                  Where memory ends it is halved
    save_every    training steps after which a state is kept to go on from; 0 is never
    """

    weight_decay: float = 0.0
    clip: float = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    at_once: int = 0
    save_every: int = 0


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A way to run a task that has a name (`--protocol`), so that its numbers can be set beside those of others.

    knobs    of the task
    fields   of every method's config, where it has them
    special  of single methods, over `fields`, by the method's name
    lr       learning rate; `rates` are those of single methods and anchors
    methods  what is compared, of what is installed, where nothing is named; () is all
    seed, seeds  the first seed, and how many
    """

    knobs: Mapping[str, Any]
    fields: Mapping[str, Any]
    lr: float
    special: Mapping[str, Mapping[str, Any]]
    rates: Mapping[str, float]
    methods: tuple[str, ...] = ()
    seed: int = 0
    seeds: int = 1

    def rate(self, method: str) -> float:
        return self.rates.get(method, self.lr)

    def fields_of(self, method: str, known: frozenset[str]) -> dict[str, Any]:
        """The fields of a method whose config has those that are `known`."""
        return {name: value for name, value in {**self.fields, **self.special.get(method, {})}.items() if name in known}


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A task; its fields are its knobs (`--knob FIELD=VALUE`), and the same knobs mean the same data on every machine.

    Subclasses are frozen keyword-only dataclasses too, named by an entry point of the group `lora_lite.tasks`.

    model       folder or name of another model than the task's own
    dtype       of the base's weights, a name in torch: "float32", "bfloat16"
    batch_size  examples a training step
    steps       training steps of a whole run

    SHORT and QUICK are the knobs' values without --full (a dozen methods in minutes) and with --quick (a check).
    PROTOCOLS are ways to run it, by name; of a task that has some, the first is taken without --protocol. ALONE is true
    where a run takes the whole machine: then runs are made one after the other, and with all threads.
    """

    summary: ClassVar[str] = ""
    SHORT: ClassVar[Mapping[str, Any]] = {"steps": 60}
    QUICK: ClassVar[Mapping[str, Any]] = {"steps": 16}
    PROTOCOLS: ClassVar[Mapping[str, Protocol]] = {}
    ALONE: ClassVar[bool] = False

    model: str = ""
    dtype: str = "float32"
    batch_size: int = 32
    steps: int = 240

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def prepare(self) -> None:  # noqa: B027 (there may be nothing to do)
        """Called once, before any run and by one process alone: fetch or make what `load` reads."""

    @abstractmethod
    def load(self) -> tuple[nn.Module, Any]:
        """A fresh model, in eval mode, on the device where it is to run, and its tokenizer or whatever makes inputs."""

    @abstractmethod
    def batches(self, processor: Any, split: Split, seed: int) -> Iterator[Batch]:
        """Batches on the CPU. "train" has no end and depends on the seed alone: every method sees the same. The others
        end and do not depend on it: "valid" chooses learning rates, "test" is reported, "own" holds what the base could
        do before, in the form that `correct` scores (no batch at all where that is unknown)."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """What is trained on: a scalar that has gradients."""

    @abstractmethod
    def correct(self, model: Any, processor: Any, batch: Batch) -> Tensor:
        """What is reported: a score between 0 and 1 of each example, (n,). Called in eval mode under no_grad."""

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What `model(**inputs)` takes of a batch; with labels where the model computes a loss, for calibration."""
        return {name: value for name, value in batch.items() if isinstance(value, Tensor)}

    def config(self) -> dict[str, Any]:
        """Fields that every variant's config gets under the user's own, such as target_names or train_modules."""
        return {}

    def head(self) -> str:
        """The dotted name of the output layer, which the anchor "head only" trains."""
        return "lm_head"

    def recipe(self) -> Recipe:
        """How it is trained."""
        return Recipe()

    def weight(self, batch: Batch) -> float:
        """How much the loss of a part of a batch counts in the loss of the whole: its examples, or what `loss` is the
        mean over. Of a batch that is trained on in parts, by several processes or because memory ends."""
        return rows(batch)

    def part(self, batch: Batch, chosen: slice) -> Batch:
        """These examples of a batch: of tensors and lists, whose first dimension they are."""
        return {name: value[chosen] if isinstance(value, (Tensor, list)) else value for name, value in batch.items()}

    def trains_whole(self) -> bool:
        """Whether the base's own weights can be trained, so that full fine-tuning and the head alone are anchors."""
        return True

    def sources(self) -> tuple[type | ModuleType, ...]:
        """Classes and modules whose files are the task's code: a result of other code is another result."""
        return (type(self),)

    def files(self) -> Sequence[Path]:
        """Files that it reads, of a folder that a knob names: their contents are part of what a result is of, as code
        is. Those of `model`; a task with data adds them. Called after `prepare`."""
        return model_files(self.model)

    def notes(self, seed: int, steps: int) -> Sequence[str]:
        """What is to be known of the data of a run with this seed and so many steps, as that texts are cut: said before
        the runs and below the table, and kept with the result. Called after `prepare`. Raises LoraLiteError where
        nothing would be trained, or scored."""
        return ()

    @classmethod
    def protocol_in(cls, folder: Path, knobs: Mapping[str, Any]) -> Protocol:
        """The protocol that a folder describes, given as `--protocol FOLDER` beside these knobs. Raises LoraLiteError
        where it describes none."""
        raise ValueError("the task reads no protocols from folders")


def rows(batch: Batch) -> int:
    """How many examples a batch has."""
    return next(len(value) for value in batch.values() if isinstance(value, Tensor))
