"""Tasks of the packaged language model: `shifted`, which transforms what it can do, and `facts`, which fills it."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from torch import Tensor, nn

from ..interface import Batch, Split, Task
from ..lookup import model_of
from .arithmetic import GIFT, ITEMS, NAMES, REFUND, Problem, problem, problems
from .base_model import PACKAGED, encode, load_base, loss_of

SCORED_AT_ONCE = 250


@dataclass(frozen=True, kw_only=True)
class TextTask(Task):
    """Questions and answers as text. An answer counts when every token of it, and its end, is the model's first choice:
    exactly when greedy generation writes it.

    test_count, valid_count  how many problems; the base's own task is scored on as many as validation
    """

    SHORT: ClassVar[Mapping[str, Any]] = {"steps": 48, "batch_size": 16, "test_count": 300, "valid_count": 100}
    QUICK: ClassVar[Mapping[str, Any]] = {"steps": 16, "batch_size": 8, "test_count": 60, "valid_count": 30}

    test_count: int = 500
    valid_count: int = 200

    def load(self) -> tuple[nn.Module, Any]:
        with model_of(self.model):
            return load_base(self.model or PACKAGED, self.torch_dtype)

    @abstractmethod
    def drawn(self, rng: random.Random) -> list[Problem]:
        """The problems of one training batch."""

    @abstractmethod
    def held_out(self, split: Split) -> list[Problem]:
        """The problems of "valid" or "test"."""

    def batches(self, processor: Any, split: Split, seed: int) -> Iterator[Batch]:
        if split == "train":
            rng = random.Random(f"train {seed}")
            while True:
                yield encode(processor, self.drawn(rng))
        asked = problems("own", "test", self.valid_count, seed=0) if split == "own" else self.held_out(split)
        for start in range(0, len(asked), SCORED_AT_ONCE):
            yield encode(processor, asked[start : start + SCORED_AT_ONCE])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return loss_of(model, batch)

    def correct(self, model: Any, processor: Any, batch: Batch) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        right = logits[:, :-1].argmax(-1) == batch["input_ids"][:, 1:]
        return (right | (batch["weights"][:, 1:] == 0)).all(1).float()

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        labels = batch["input_ids"].where(batch["weights"] > 0, -100)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


@dataclass(frozen=True, kw_only=True)
class Shifted(TextTask):
    """Arithmetic in a town where a gain brings `gift` more and a loss is refunded `refund`.

    The base adds and subtracts; here not one of its answers is right. Needs a change of what it computes, not memory.
    """

    summary: ClassVar[str] = "transforms: known arithmetic with an unseen number carried in"
    SHORT: ClassVar[Mapping[str, Any]] = {**TextTask.SHORT, "gift": 20, "refund": 20}  # learned in fewer steps

    gift: int = GIFT
    refund: int = REFUND

    def drawn(self, rng: random.Random) -> list[Problem]:
        return [problem("shifted", "train", rng, gift=self.gift, refund=self.refund) for _ in range(self.batch_size)]

    def held_out(self, split: Split) -> list[Problem]:
        count, kind = (self.test_count, "test") if split == "test" else (self.valid_count, "valid")
        return problems("shifted", kind, count, seed=0, gift=self.gift, refund=self.refund)


@dataclass(frozen=True, kw_only=True)
class Facts(TextTask):
    """Recall of `facts` random facts: two names and a thing have a number of `digits` digits, which follows from
    nothing. Needs room for facts × digits × 3.3 bits; what is scored is what was trained, half of it as "valid" (to
    choose a learning rate), the other half as "test".

    draw  which facts
    """

    summary: ClassVar[str] = "needs capacity: recall of random facts"
    SHORT: ClassVar[Mapping[str, Any]] = {**TextTask.SHORT, "facts": 64, "batch_size": 32, "steps": 200}
    QUICK: ClassVar[Mapping[str, Any]] = {**TextTask.QUICK, "facts": 16}

    facts: int = 256
    digits: int = 2
    draw: int = 0
    batch_size: int = 64
    steps: int = 480

    def __post_init__(self) -> None:
        most = len(NAMES) ** 2 * len(ITEMS)
        if not 2 <= self.facts <= most:
            raise ValueError(f"facts={self.facts}: from 2 to {most} can be told apart")

    def drawn(self, rng: random.Random) -> list[Problem]:
        return rng.choices(_facts(self.facts, self.digits, self.draw), k=self.batch_size)

    def held_out(self, split: Split) -> list[Problem]:
        return _facts(self.facts, self.digits, self.draw)[split == "test" :: 2]


@lru_cache(maxsize=4)
def _facts(count: int, digits: int, draw: int) -> list[Problem]:
    rng = random.Random(f"facts {draw}")
    keys = rng.sample([(a, b, item) for a in NAMES for b in NAMES for item in ITEMS], count)
    return [Problem(f"{a} and {b} {item} ?", "".join(rng.choices("0123456789", k=digits))) for a, b, item in keys]
