"""Whether texts have room in the tokens that the task takes: how many are cut, and whether anything is left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..lookup import TaskError

AT_ONCE = 1000  # texts that are made tokens together


def of_training(
    tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], length: int, all_in_loss: bool, file: str
) -> list[str]:
    """What is to be said of texts that are trained on. Raises TaskError where no token of them would be."""
    asked = list(_tokens(tokenizer, prompts))
    said = _tokens(tokenizer, answers, add_special_tokens=False)
    whole = [a + b + 1 for a, b in zip(asked, said, strict=True)]  # with the end of the text
    first = [1 if all_in_loss else max(1, a) for a in asked]  # of the tokens in the loss: nothing predicts token 0
    cut = sum(n > length for n in whole)
    passed = sum(start >= length for start in first)
    if passed == len(whole) > 0:
        token = "no token" if all_in_loss else "no token of an answer"
        raise TaskError(
            f"task 'gsm8k': nothing would be trained: {token} lies within length={length} in any of {passed:,} texts "
            f"of {file}, whose prompts have {min(asked):,} tokens or more; type: --knob length={max(whole)}"
        )
    of = f"of {len(whole):,} drawn texts"
    longer = f"{file}: {cut:,} {of} are longer than length={length} tokens and cut there; for all: --knob length="
    over = f"{file}: {passed:,} {of} have no token of the answer within length={length} and are passed over"
    return [*([f"{longer}{max(whole)}"] if cut else []), *([over] if passed else [])]


def of_problems(tokenizer: Any, prompts: Sequence[str], length: int, new_tokens: int, file: str) -> list[str]:
    """What is to be said of problems whose answers are generated. Raises TaskError where none can have an answer."""
    asked = list(_tokens(tokenizer, prompts))
    less, none = sum(n + new_tokens > length for n in asked), sum(n >= length for n in asked)
    room = f"--knob length={max(asked, default=0) + new_tokens}"
    if none == len(asked) > 0:
        raise TaskError(
            f"task 'gsm8k': none of {none:,} problems of {file} has room for an answer within length={length}, as "
            f"their prompts have {min(asked):,} tokens or more; type: {room}"
        )
    if not less:
        return []
    wrong = f", {none:,} none at all, which count as wrong" if none else ""
    few = f"{less:,} of {len(asked):,} problems have less room than new_tokens={new_tokens} for the answer"
    return [f"{file}: {few} within length={length}{wrong}; for all: {room}"]


def _tokens(tokenizer: Any, texts: Sequence[str], **options: Any) -> Iterator[int]:
    """How many each text has."""
    for start in range(0, len(texts), AT_ONCE):
        yield from map(len, tokenizer(list(texts[start : start + AT_ONCE]), **options)["input_ids"])
