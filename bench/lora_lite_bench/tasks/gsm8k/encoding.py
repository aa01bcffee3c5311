"""Texts as tokens and back: prompts with their answers for training, generated answers for scoring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..interface import Batch

IGNORED = -100  # a label that is not in the loss


def encode(tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], length: int, all_in_loss: bool) -> Batch:
    """Token ids, attention mask and labels (n, longest), padded on the left; each answer ends with the end-of-text
    token, and with its prompt is cut after `length` tokens. Labels of prompts are IGNORED, unless all are in the loss:
    a prompt that is as long leaves no label.
    """
    asked = tokenizer(list(prompts))["input_ids"]
    said = tokenizer(list(answers), add_special_tokens=False)["input_ids"]
    rows = [(a + b + [tokenizer.eos_token_id])[:length] for a, b in zip(asked, said, strict=True)]
    masked = [0 if all_in_loss else min(len(a), length) for a in asked]
    longest = max(map(len, rows))
    input_ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full((len(rows), longest), IGNORED)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for n, (row, hidden) in enumerate(zip(rows, masked, strict=True)):
        start = longest - len(row)
        input_ids[n, start:] = torch.tensor(row)
        labels[n, start + hidden :] = torch.tensor(row[hidden:])
        mask[n, start:] = 1
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def learns(batch: Batch) -> Tensor:
    """Of each example, whether one of its tokens at least is in the loss: the first is not predicted, (n,)."""
    return (batch["labels"][:, 1:] != IGNORED).any(1)


def trimmed(batch: Batch) -> Batch:
    """Without the columns on the left that are padding in every row."""
    columns = batch["attention_mask"].any(0)
    start = int(columns.float().argmax()) if len(batch["attention_mask"]) else 0
    return {name: value[:, start:] if isinstance(value, Tensor) else value for name, value in batch.items()}


def generate(model: Any, tokenizer: Any, prompts: Sequence[str], length: int, new_tokens: int) -> list[str]:
    """What the model writes after each prompt, greedily: at most `new_tokens` tokens, and `length` with the prompt, of
    its own length and not of the longest beside it; nothing where there is no room."""
    asked = tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt")
    device = next(model.parameters()).device
    start = asked["input_ids"].shape[1]
    rooms = [max(0, min(new_tokens, length - own)) for own in asked["attention_mask"].sum(1).tolist()]
    if not any(rooms):
        return [""] * len(rooms)
    made = model.generate(
        input_ids=asked["input_ids"].to(device),
        attention_mask=asked["attention_mask"].to(device),
        max_new_tokens=max(rooms),
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=True,
    )
    written = [row[start : start + room] for row, room in zip(made, rooms, strict=True)]
    return list(tokenizer.batch_decode(written, skip_special_tokens=True))
