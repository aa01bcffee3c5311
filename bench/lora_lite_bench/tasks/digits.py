"""`digits`: a small vision transformer that reads handwritten digits learns to read them turned and in negative."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from .cache import made
from .interface import Batch, Split, Task
from .lookup import TaskError, model_of

MAKING = 300  # steps in which the base is made


@dataclass(frozen=True, kw_only=True)
class Digits(Task):
    """scikit-learn's 1,797 images of 8 × 8 pixels, turned by `quarter_turns` and, with `negative`, light for dark. The
    base reads them upright, which is its own task; its head is trained beside the adapter. Three in five images are for
    training (the base's, too), one for "valid", one for "test"."""

    summary: ClassVar[str] = "image classification: scikit-learn's digits, turned and in negative, by a small ViT"

    quarter_turns: int = 1
    negative: bool = True

    def prepare(self) -> None:
        _images()
        if not self.model:
            _folder()

    def load(self) -> tuple[nn.Module, Any]:
        folder = self.model or _folder()
        with model_of(self.model):
            model = AutoModelForImageClassification.from_pretrained(folder, dtype=self.torch_dtype)
        return model.eval(), None

    def batches(self, processor: Any, split: Split, seed: int) -> Iterator[Batch]:
        pixels, labels = _images()
        part = _part("test" if split == "own" else split)
        shown = pixels if split == "own" else self._changed(pixels)
        if split == "train":
            rng = random.Random(f"digits {seed}")
            while True:
                chosen = torch.tensor(rng.choices(part, k=self.batch_size))
                yield {"pixel_values": shown[chosen].to(self.torch_dtype), "labels": labels[chosen]}
        yield {"pixel_values": shown[part].to(self.torch_dtype), "labels": labels[part]}

    def _changed(self, pixels: Tensor) -> Tensor:
        turned = torch.rot90(pixels, self.quarter_turns, (2, 3))
        return 1 - turned if self.negative else turned

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(**batch).loss.float()

    def correct(self, model: Any, processor: Any, batch: Batch) -> Tensor:
        return (model(pixel_values=batch["pixel_values"]).logits.argmax(-1) == batch["labels"]).float()

    def config(self) -> dict[str, Any]:
        return {"exclude_names": ("classifier",), "train_modules": ("classifier",)}

    def head(self) -> str:
        return "classifier"


@lru_cache(maxsize=1)
def _images() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        raise TaskError("task 'digits' needs scikit-learn; type: pip install 'lora-lite-bench[digits]'") from error
    found: Any = load_digits()
    return torch.tensor(found.images, dtype=torch.float32)[:, None] / 16, torch.tensor(found.target)


def _part(split: str) -> list[int]:
    """The images of a split: the file's order is by writer, so that neighbours stay together."""
    count, block = len(_images()[1]), 60
    kind = {"train": (0, 1, 2), "valid": (3,), "test": (4,)}[split]
    return [n for n in range(count) if n // block % 5 in kind]


def _folder() -> Path:
    return made("digits", Path(__file__), _make)


def _make() -> ViTForImageClassification:
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    config.num_labels = 10
    model = ViTForImageClassification(config).train()
    pixels, labels = _images()
    part, rng = _part("train"), random.Random("digits base")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, MAKING)
    for _ in range(MAKING):
        chosen = torch.tensor(rng.choices(part, k=64))
        model(pixel_values=pixels[chosen], labels=labels[chosen]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return model
