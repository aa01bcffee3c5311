"""Training by a recipe: batches in parts, memory that ends, weight decay, clipping, schedules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from lora_lite_bench.runs.scoring import score, valid_loss
from lora_lite_bench.runs.training import Training, parts
from lora_lite_bench.tasks import Batch, Recipe, Task, rows
from lora_lite_bench.tasks.gsm8k import Gsm8k
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("own_cache")


@dataclass(frozen=True, kw_only=True)
class Lines(Task):
    """Straight lines through points: the mean square error of a linear layer. `most` examples fit into memory."""

    batch_size: int = 6
    most: int = 10**9
    decay: float = 0.0
    clip: float = 0.0
    schedule: Any = "cosine"

    def load(self) -> tuple[nn.Module, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).eval(), None

    def batches(self, processor: Any, split: Any, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while split != "own":
            x = torch.randn(self.batch_size, 3, generator=generator)
            yield {"x": x, "y": x.sum(1, keepdim=True)}
            if split != "train":
                return

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if rows(batch) > self.most:
            torch.empty(2**55)  # more than any machine has: the allocator says so
        return nn.functional.mse_loss(model(batch["x"]), batch["y"])

    def correct(self, model: Any, processor: Any, batch: Batch) -> Tensor:
        self.loss(model, batch)
        return (batch["x"][:, 0] > 0).float()

    def recipe(self) -> Recipe:
        return Recipe(weight_decay=self.decay, clip=self.clip, schedule=self.schedule)


def trained(task: Lines, steps: int = 5, lr: float = 0.05) -> tuple[Training, list[Tensor]]:
    model, _ = task.load()
    training = Training(task, model, list(model.parameters()), adapted=False, lr=lr, steps=steps)
    training.carry_out(None, 0, lambda: None)
    return training, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(("most", "found"), [(4, 3), (2, 1), (1, 1)])
def test_memory_that_ends_halves_what_goes_through_at_once(most: int, found: int) -> None:
    whole, expected = trained(Lines())
    halved, got = trained(Lines(most=most))
    assert (whole.at_once.size, halved.at_once.size) == (6, found)
    assert halved.losses == pytest.approx(whole.losses, abs=2e-5)
    torch.testing.assert_close(got, expected)
    task = Lines(most=most)
    model, _ = task.load()
    assert score(task, model, None, "test") == score(Lines(), model, None, "test")
    assert valid_loss(task, model, None) == pytest.approx(valid_loss(Lines(), model, None))


def test_one_example_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        trained(Lines(most=0))


def test_parts_are_of_all_examples() -> None:
    task = Lines()
    batch = next(task.batches(None, "valid", 0))
    for size in (1, 4, 6, 9):
        made = parts(task, batch, size)
        assert max(map(rows, made)) <= size
        assert torch.equal(torch.cat([part["x"] for part in made]), batch["x"])


def test_recipe() -> None:
    """AdamW by hand: decay of matrices, not of biases; clipping; the schedule's first rates."""
    task = Lines(decay=0.5, clip=1e-3, schedule="constant")
    model, _ = task.load()
    _, got = trained(task, steps=1)
    batch = next(task.batches(None, "train", 0))
    task.loss(model, batch).backward()
    for before, after in zip(model.parameters(), got, strict=True):
        decayed = before * (1 - 0.05 * 0.5) if before.dim() > 1 else before
        assert before.grad is not None
        torch.testing.assert_close(after, decayed - 0.05 * before.grad.sign(), atol=1e-3, rtol=0)
    norms = []
    model, _ = task.load()
    training = Training(task, model, list(model.parameters()), adapted=False, lr=0.05, steps=2)
    training.optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.stack([p.grad.norm() for p in training.parameters]).norm().item())
    )
    training.carry_out(None, 0, lambda: None)
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-3)
    cosine = Training(Lines(), model, list(model.parameters()), adapted=False, lr=0.05, steps=20)
    assert cosine.scheduler.get_last_lr() == [0.0, 0.0], "a warm-up over a tenth of the steps"


def test_gsm8k_keeps_states_and_takes_the_whole_machine() -> None:
    assert Gsm8k().recipe() == Recipe(weight_decay=0.1, clip=1.0, save_every=100)
    assert Gsm8k.ALONE
