"""`order`: an encoder that compares two numbers by size learns to compare them by their last digits."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from .cache import made
from .interface import Batch, Split, Task
from .language.arithmetic import ITEMS, NAMES, split_of
from .language.base_model import PAD, new_tokenizer
from .lookup import model_of

MAKING = 600  # steps in which the base is made
Pair = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Order(Task):
    """Sequence classification, "Ann has 34 pens and Ben 57": whose number has the larger last digit (no ties)? The
    encoder was made to say whose number is larger, which is its own task, in two classes of its own; the head is
    trained beside the adapter. With `model` another encoder's folder, whose own task is not known.

    test_count, valid_count  how many questions
    """

    summary: ClassVar[str] = "sequence classification: an encoder that compares numbers compares their last digits"
    QUICK: ClassVar[Mapping[str, Any]] = {"steps": 16, "batch_size": 8, "test_count": 60, "valid_count": 30}

    test_count: int = 500
    valid_count: int = 200

    def prepare(self) -> None:
        if not self.model:
            _folder()

    def load(self) -> tuple[nn.Module, Any]:
        folder = self.model or _folder()
        with model_of(self.model):
            tokenizer = AutoTokenizer.from_pretrained(self.model) if self.model else new_tokenizer()
            model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=4, dtype=self.torch_dtype)
        return model.eval(), tokenizer

    def batches(self, processor: Any, split: Split, seed: int) -> Iterator[Batch]:
        if split == "train":
            rng = random.Random(f"order {seed}")
            while True:
                yield _encoded(processor, [_pair(rng, "train", ties=False) for _ in range(self.batch_size)], rng)
        rng = random.Random(f"order {split}")
        kind: Split = "valid" if split == "valid" else "test"
        if split != "own" or not self.model:
            count = self.valid_count if split == "valid" else self.test_count
            pairs = [_pair(rng, kind, ties=split == "own") for _ in range(count)]
            yield _encoded(processor, pairs, rng, own=split == "own")

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(**_asked(batch)).logits
        return nn.functional.cross_entropy(logits[:, 2:].float(), batch["labels"] - 2)

    def correct(self, model: Any, processor: Any, batch: Batch) -> Tensor:
        own = batch["labels"] < 2
        logits = model(**_asked(batch)).logits
        said = torch.where(own, logits[:, :2].argmax(-1), 2 + logits[:, 2:].argmax(-1))
        return (said == batch["labels"]).float()

    def config(self) -> dict[str, Any]:
        return {"exclude_names": ("classifier",), "train_modules": ("classifier",)}

    def head(self) -> str:
        return "classifier"


def _asked(batch: Batch) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _pair(rng: random.Random, split: Split, *, ties: bool) -> Pair:
    while True:
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        if a != b and split_of(a, b) == split and (ties or a % 10 != b % 10):
            return a, b


def _encoded(tokenizer: Any, pairs: Sequence[Pair], rng: random.Random, *, own: bool = False) -> Batch:
    """Labels 0 and 1 say which of two numbers is larger, 2 and 3 which last digit is."""
    texts = [f"{rng.choice(NAMES)} has {a} {rng.choice(ITEMS)} and {rng.choice(NAMES)} {b}" for a, b in pairs]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    labels = torch.tensor([int(b > a) if own else 2 + int(b % 10 > a % 10) for a, b in pairs])
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels}


def _folder() -> Path:
    return made("order", Path(__file__), _make)


def _make() -> BertForSequenceClassification:
    tokenizer = new_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=int(tokenizer.get_vocab()[PAD]),
    )
    config.num_labels = 4
    model = BertForSequenceClassification(config).train()
    rng = random.Random("order base")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, MAKING)
    for _ in range(MAKING):
        batch = _encoded(tokenizer, [_pair(rng, "train", ties=True) for _ in range(64)], rng, own=True)
        nn.functional.cross_entropy(model(**_asked(batch)).logits[:, :2], batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return model
