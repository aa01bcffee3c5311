"""Does an adapter train, save and reload on a real model? A few steps on Qwen3, with what is checked on the way.

    python examples/qwen_probe.py                        # a tiny Qwen3 that is made on the spot
    python examples/qwen_probe.py Qwen/Qwen3-0.6B lora   # a name on the hub, or a folder; then variants

Exits with an error where an output is not the base's before training, or after reload not what it was.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import lora_lite as ll

TEXT = "Adapters are small: a few numbers beside each weight, trained alone, kept in a file of their own."


def model_and_tokens(name: str | None) -> tuple[Any, torch.Tensor]:
    if name is not None:
        ids = AutoTokenizer.from_pretrained(name)(TEXT, return_tensors="pt")["input_ids"]
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).eval(), ids
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 16,
    }
    config = Qwen3Config(vocab_size=256, num_key_value_heads=2, **sizes)
    return Qwen3ForCausalLM(config).to(torch.bfloat16).eval(), torch.tensor([list(TEXT.encode())])


def probe(model: Any, ids: torch.Tensor, variant: str, steps: int) -> tuple[float, float]:
    """The losses before and after; raises AssertionError where a promise does not hold."""
    base = model(ids).logits
    adapter = ll.attach(model, ll.LoraLiteConfig(variant=variant))
    print(adapter)
    torch.testing.assert_close(model(ids).logits, base, rtol=0.02, atol=0.02)
    optimizer = torch.optim.AdamW(ll.param_groups(model, lr=ll.get_variant(variant).bench.get("lr", 5e-3)))
    ll.follow(model, optimizer)
    losses = []
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        (loss + ll.penalty(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    trained = model(ids).logits
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        ll.save(model, path)
        ll.detach(model)
        assert torch.equal(model(ids).logits, base), "the base has changed"
        ll.load(model, path)
        assert torch.equal(model(ids).logits, trained), "the reloaded adapter computes another thing"
        print(
            f"{variant}: loss {losses[0]:.3f} → {losses[-1]:.3f} in {steps} steps, {path.stat().st_size:,} bytes, "
            "reloaded"
        )
    ll.detach(model)
    return losses[0], losses[-1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a name on the hub or a folder; a tiny Qwen3 is made without")
    parser.add_argument("variants", nargs="*", default=["lora", "pissa", "hra"])
    parser.add_argument("--steps", type=int, default=8)
    given = parser.parse_args()
    chosen, tokens = model_and_tokens(given.model)
    for one in given.variants:
        before, after = probe(chosen, tokens, one, given.steps)
        if not after < before:
            raise SystemExit(f"{one} has not learned: {before:.3f} → {after:.3f}")
