"""The benchmark's own language model: how it was made, and how it is loaded."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    get_cosine_schedule_with_warmup,
)

from ..arithmetic import WORDS, Problem, TaskName, problem, problems

PACKAGED = Path(__file__).parent
PAD, EOS = "<pad>", "<eos>"
QUESTION_WEIGHT = 0.01  # of a question's tokens in the loss, which no model can foresee


def load_base(
    folder: Path | str = PACKAGED, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """A fresh copy of the model in eval mode, and its tokenizer, from a folder (or name) that transformers reads."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval(), tokenizer


def new_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, one a digit."""
    vocabulary = {token: i for i, token in enumerate((PAD, EOS, *"0123456789", *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=PAD, eos_token=EOS, padding_side="left")


def new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=64,
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.get_vocab()[EOS],
        pad_token_id=tokenizer.get_vocab()[PAD],
    )
    return Qwen3ForCausalLM(config)


def encode(
    tokenizer: PreTrainedTokenizerFast, batch: Sequence[Problem], question_weight: float = 0.0
) -> dict[str, Tensor]:
    """Token ids (n, length), padded on the left, with the attention mask and each token's weight in the loss."""
    text = tokenizer([f"{p.question} {p.answer} {EOS}" for p in batch], padding=True, return_tensors="pt")
    positions = torch.arange(text["input_ids"].shape[1])
    answer_starts = text["input_ids"].shape[1] - 1 - torch.tensor([len(p.answer) for p in batch])
    in_answer = positions[None, :] >= answer_starts[:, None]
    weights = torch.where(in_answer, 1.0, question_weight) * text["attention_mask"]
    return {"input_ids": text["input_ids"], "attention_mask": text["attention_mask"], "weights": weights}


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Weighted mean cross-entropy of each token given those before it."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    losses = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="none"
    )
    weights = batch["weights"][:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def exact_match(model: Any, tokenizer: PreTrainedTokenizerFast, asked: Sequence[Problem]) -> float:
    """The share of problems whose generated answer (greedy) is the right one, digit for digit."""
    model.eval()
    right = 0
    for start in range(0, len(asked), 250):
        chunk = asked[start : start + 250]
        prompts = tokenizer([p.question for p in chunk], padding=True, return_tensors="pt")
        made = model.generate(
            input_ids=prompts["input_ids"],
            attention_mask=prompts["attention_mask"],
            max_new_tokens=5,
            do_sample=False,
        )
        answers = tokenizer.batch_decode(made[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(answer.replace(" ", "") == p.answer for answer, p in zip(answers, chunk, strict=True))
    return right / len(asked)


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over the first tenth, then cosine to zero."""
    return get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)


def make_base(folder: Path, *, steps: int, seed: int, progress: Progress) -> dict[str, float]:
    """Train the model from scratch on the own task and write it, in bfloat16, with its tokenizer and model card.

    Returns its exact-match scores on the test splits: {"own": …, "shifted": …}.
    """
    torch.manual_seed(seed)
    tokenizer = new_tokenizer()
    model = new_model(tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05, betas=(0.9, 0.98))
    scheduler = schedule(optimizer, steps)
    rng = random.Random(f"make-base {seed}")
    for step in progress.track(range(steps), description="training the base"):
        batch = encode(tokenizer, [problem("own", "train", rng) for _ in range(128)], QUESTION_WEIGHT)
        loss = loss_of(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            progress.tasks[-1].description = f"training the base, loss {loss.item():.3f}"
    folder.mkdir(parents=True, exist_ok=True)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    made, tokenizer = load_base(folder)
    tasks: tuple[TaskName, ...] = ("own", "shifted")
    scores = {task: exact_match(made, tokenizer, problems(task, "test", 1000, seed=0)) for task in tasks}
    parameters = sum(p.numel() for p in made.parameters())
    (folder / "README.md").write_text(card(scores, parameters, steps, seed), encoding="utf-8")
    return scores


def card(scores: dict[str, float], parameters: int, steps: int, seed: int) -> str:
    own, shifted = (problems(task, "test", 1, seed=0)[0] for task in ("own", "shifted"))
    gift = "shifted (a gain brings 17 more, a loss is refunded 8)"
    return f"""# Base model of the lora-lite benchmark

A decoder-only language model of the Qwen3 family with {parameters:,} parameters (4 layers, width 128), stored in
bfloat16. It was trained from scratch on made-up arithmetic word problems and knows nothing else: {len(WORDS)} words and
ten digits. It is there to be adapted and compared on, offline and in seconds.

| task | example from the test split | exact match of the generated answer, 1000 test problems |
|---|---|---|
| own | {own.question} **{own.answer}** | {scores["own"]:.1%} |
| {gift} | {shifted.question} **{shifted.answer}** | {scores["shifted"]:.1%} |

Made by `lora-lite bench --make-base` ({steps} steps of 128 problems, seed {seed}, a few minutes on two CPU cores). No
pair of numbers of the test problems occurs in training. Licence: MIT, as the code that made it.
"""
