"""Several processes on one run, started by torchrun or `accelerate launch`: each takes a share of every batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import nn

from lora_lite_core.contract.errors import LoraLiteError

T = TypeVar("T")


class ProcessesError(LoraLiteError):
    """Several processes were started and cannot work together."""


class Processes:
    """The processes of a run: `rank` is this one's number of `count`, `main` the first, which alone writes."""

    rank, count = 0, 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's examples of so many."""
        return slice(self.rank, count, self.count)

    def gathered(self, values: list[T]) -> list[T]:
        """The values of all processes."""
        return values

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its sum over the processes."""

    def main_first(self, work: Callable[[], T]) -> T:
        """work(), in the first process before the others."""
        return work()

    def end(self) -> None:
        """Leave the others, when all are done."""


class Several(Processes):
    """More than one, by accelerate: NCCL where there are GPUs, gloo on CPUs."""

    def __init__(self) -> None:
        try:
            from accelerate import PartialState  # pyright: ignore[reportMissingTypeStubs]
        except ImportError as error:
            raise ProcessesError(
                f"{os.environ['WORLD_SIZE']} processes need accelerate; type: pip install 'lora-lite-bench[gsm8k]'"
            ) from error
        self.state: Any = PartialState(cpu=not torch.cuda.is_available())
        self.rank, self.count = int(self.state.process_index), int(self.state.num_processes)

    def gathered(self, values: list[T]) -> list[T]:
        from accelerate.utils import gather_object  # pyright: ignore[reportMissingTypeStubs]

        return list(gather_object(values))

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        from accelerate.utils import reduce  # pyright: ignore[reportMissingTypeStubs]

        for parameter in parameters:
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            found: Any = reduce(own, reduction="sum")
            parameter.grad = found

    def main_first(self, work: Callable[[], T]) -> T:
        with self.state.main_process_first():
            return work()

    def end(self) -> None:
        self.state.wait_for_everyone()
        self.state.destroy_process_group()


@cache
def processes() -> Processes:
    """Those that this one was started with. Raises ProcessesError where they lack what they need."""
    return Several() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Processes()
