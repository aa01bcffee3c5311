"""The task `gsm8k`: a language model learns to solve word problems step by step, and is scored on what it writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..interface import Batch, Protocol, Recipe, Split, Task
from ..lookup import make_task
from . import corpus, data_files, encoding, final_answers, loading, room
from .protocols import BASE, PROMPT, PROTOCOLS


@dataclass(frozen=True, kw_only=True)
class Gsm8k(Task):
    """MetaMathQA → GSM8K: trained on worked answers of MetaMathQA, validated on problems of GSM8K's training set,
    tested on its test set, by the final answer that the model generates (greedily). The defaults are the protocol
    lora-lite.

    data           a folder with the texts, where there is no network; "" is the hub
    quantize       "nf4", "fp4" or "int8": the base in 4 or 8 bits, by bitsandbytes; "" as it is
    prompt         with {query} where the question goes
    between        what stands between the prompt and the answer
    trained_on     "answer", or "all": the loss is of the question's tokens, too
    length         tokens of a question and its answer, at most: the rest is cut, and that is told (`notes`)
    new_tokens     that are generated, at most
    answers        how a final answer is read: "any", "stated" (PEFT's rule), "strict-match", "flexible-extract"
                   (lm-eval's)
    at_once        examples that go through the model together in training, at most (0: all of a batch); halved where
                   memory ends, the batch is then accumulated
    scored_at_once the same of generation
    checkpointing  recompute activations in the backward pass: less memory, more time
    weight_decay, clip, schedule, save_every  see `Recipe`
    valid_count, test_count  problems, at most
    """

    summary: ClassVar[str] = "MetaMathQA → GSM8K: a language model solves word problems (needs a model and data)"
    SHORT: ClassVar[Mapping[str, Any]] = {}
    QUICK: ClassVar[Mapping[str, Any]] = {"steps": 16, "valid_count": 8, "test_count": 16, "new_tokens": 64}
    PROTOCOLS: ClassVar[Mapping[str, Protocol]] = PROTOCOLS
    ALONE: ClassVar[bool] = True

    model: str = BASE
    dtype: str = "bfloat16"
    batch_size: int = 8
    steps: int = 2500
    data: str = ""
    quantize: str = ""
    prompt: str = PROMPT
    between: str = " "
    trained_on: Literal["answer", "all"] = "answer"
    length: int = 768
    new_tokens: int = 300
    answers: str = "any"
    at_once: int = 0
    scored_at_once: int = 50
    checkpointing: bool = False
    weight_decay: float = 0.1
    clip: float = 1.0
    schedule: Literal["cosine", "constant"] = "cosine"
    save_every: int = 100
    valid_count: int = 50
    test_count: int = 1319

    def __post_init__(self) -> None:
        if self.quantize not in ("", *loading.QUANTIZED):
            raise ValueError(f"quantize={self.quantize!r}: one of {', '.join(loading.QUANTIZED)}, or nothing")
        if "{query}" not in self.prompt:
            raise ValueError(f"prompt={self.prompt!r} has no {{query}}, the place of the question")
        if self.answers not in final_answers.RULES:
            raise ValueError(f"answers={self.answers!r}: one of {', '.join(final_answers.RULES)}")
        for name in ("valid_count", "test_count", "scored_at_once", "length", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")

    def prepare(self) -> None:
        for part in corpus.SOURCES:
            corpus.texts(part, self.data)
        loading.check(self.model, self.quantize)

    def load(self) -> tuple[nn.Module, Any]:
        return loading.load(self.model, self.torch_dtype, self.quantize, self.checkpointing)

    def batches(self, processor: Any, split: Split, seed: int) -> Iterator[Batch]:
        if split == "train":
            drawn = self._drawn(seed)
            while True:
                yield self._learnable(processor, drawn)
        elif split != "own":
            texts = self._problems(split)
            for start in range(0, len(texts), self.scored_at_once):
                yield self._encoded(processor, texts[start : start + self.scored_at_once], asked=True)

    def _problems(self, split: Literal["valid", "test"]) -> tuple[corpus.Text, ...]:
        return corpus.texts(split, self.data)[: self.valid_count if split == "valid" else self.test_count]

    def _drawn(self, seed: int) -> Iterator[corpus.Text]:
        """The texts that are trained on, without end: each epoch in another order."""
        texts = corpus.texts("train", self.data)
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield from (texts[n] for n in torch.randperm(len(texts), generator=generator).tolist())

    def _learnable(self, processor: Any, drawn: Iterator[corpus.Text]) -> Batch:
        """The next batch, past texts of which no token would be trained. Raises TaskError where all are so."""
        texts, passed = list(islice(drawn, self.batch_size)), 0
        while not (learns := encoding.learns(batch := self._encoded(processor, texts))).all():
            texts = [text for text, kept in zip(texts, learns.tolist(), strict=True) if kept]
            passed += self.batch_size - len(texts)
            if passed > len(every := corpus.texts("train", self.data)):
                self._train_notes(processor, every)
            texts += islice(drawn, self.batch_size - len(texts))
        return batch

    def _encoded(self, processor: Any, texts: Sequence[corpus.Text], *, asked: bool = False) -> Batch:
        """With the prompts and the right answers as text where they are `asked`."""
        prompts, answers = self._spelled(texts)
        found: Batch = encoding.encode(processor, prompts, answers, self.length, self.trained_on == "all")
        return {**found, "prompts": prompts, "answers": [text.answer for text in texts]} if asked else found

    def _spelled(self, texts: Sequence[corpus.Text]) -> tuple[list[str], list[str]]:
        """Prompts and answers, as they are made tokens."""
        prompts = [self.prompt.replace("{query}", text.question) for text in texts]
        return prompts, [self.between + text.answer for text in texts]

    def notes(self, seed: int, steps: int) -> Sequence[str]:
        """Which texts are longer than `length`, of those that such a run draws and of the problems."""
        return _notes(self, seed, steps)

    def _train_notes(self, tokenizer: Any, texts: Sequence[corpus.Text]) -> list[str]:
        every = self.trained_on == "all"
        return room.of_training(tokenizer, *self._spelled(texts), self.length, every, corpus.TRAIN.file)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Zero of examples without a label, which are none of those that are trained on."""
        found = model(**self.inputs(batch), use_cache=False).loss.float()
        return found if self.weight(batch) else torch.zeros_like(found)

    def weight(self, batch: Batch) -> float:
        """The tokens that the loss is the mean over."""
        return int((batch["labels"][:, 1:] != encoding.IGNORED).sum())

    def part(self, batch: Batch, chosen: slice) -> Batch:
        return encoding.trimmed(super().part(batch, chosen))

    def correct(self, model: Any, processor: Any, batch: Batch) -> Tensor:
        written = encoding.generate(model, processor, batch["prompts"], self.length, self.new_tokens)
        right = [
            final_answers.same(final_answers.answer_of(text, self.answers), final_answers.answer_of(reference))
            for text, reference in zip(written, batch["answers"], strict=True)
        ]
        return torch.tensor(right, dtype=torch.float32)

    def recipe(self) -> Recipe:
        return Recipe(
            weight_decay=self.weight_decay,
            clip=self.clip,
            schedule=self.schedule,
            at_once=self.at_once,
            save_every=self.save_every,
        )

    def trains_whole(self) -> bool:
        return not self.quantize

    def sources(self) -> tuple[type | ModuleType, ...]:
        return (Gsm8k, corpus, data_files, encoding, final_answers, loading, room)

    def files(self) -> Sequence[Path]:
        return [*super().files(), *(corpus.files(self.data) if self.data else ())]

    @classmethod
    def protocol_in(cls, folder: Path, knobs: Mapping[str, Any]) -> Protocol:
        """An experiment of PEFT's method comparison."""
        from .experiment import read_experiment

        return read_experiment(folder, lambda found: make_task("gsm8k", {**found, **knobs}))


@lru_cache(maxsize=64)
def _notes(task: Gsm8k, seed: int, steps: int) -> tuple[str, ...]:
    tokenizer = loading.tokenizer_of(task.model)
    found = [note for part in corpus.SOURCES if steps or part != "train" for note in corpus.read(part, task.data).notes]
    count = min(steps * task.batch_size, len(corpus.texts("train", task.data)))
    found += task._train_notes(tokenizer, list(islice(task._drawn(seed), count)))
    for split in ("valid", "test"):
        prompts, _ = task._spelled(task._problems(split))
        found += room.of_problems(tokenizer, prompts, task.length, task.new_tokens, corpus.SOURCES[split].file)
    return tuple(found)
