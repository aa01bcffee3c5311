"""What a task of `lora-lite bench` is: a model, batches, a loss, and what counts as right."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

Split = Literal["train", "valid", "test", "own"]
Batch = dict[str, Any]  # tensors by name, first dimension the examples; other values may ride along for `correct`


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A task; its fields are its knobs (`--knob FIELD=VALUE`), and the same knobs mean the same data on every machine.

    Subclasses are frozen keyword-only dataclasses too, named by an entry point of the group `lora_lite.tasks`.

    model       folder or name of another model than the task's own
    dtype       of the base's weights, a name in torch: "float32", "bfloat16"
    batch_size  examples a training step
    steps       training steps of a whole run

    SHORT and QUICK are the knobs' values without --full (a dozen methods in minutes) and with --quick (a check).
    """

    summary: ClassVar[str] = ""
    SHORT: ClassVar[Mapping[str, Any]] = {"steps": 60}
    QUICK: ClassVar[Mapping[str, Any]] = {"steps": 16}

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
