"""vLLM as an engine of `verify_export`: it generates from a prompt with an exported folder, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import lora_lite_core as ll

MARK = "lora-lite-vllm: "  # before the tokens, behind whatever vLLM has printed
MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes for max_lora_rank


def generate(base: str, folder: Path, prompt: Sequence[int], count: int) -> list[int]:
    """`count` token ids that vLLM generates greedily in float32. Raises ModelStateError with what it says where it
    cannot be run, or cannot load the folder."""
    given = json.dumps({"base": base, "folder": str(folder), "prompt": [*prompt], "count": count})
    done = subprocess.run([sys.executable, "-m", __name__, given], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        causes = [line for line in lines if "Error: " in line] or lines
        raise ll.ModelStateError(f"vLLM could not generate with {folder}\n  {causes[-1] if causes else 'no word'}")
    return json.loads(done.stdout.rpartition(MARK)[2].partition("\n")[0])


def main(base: str, folder: str, prompt: list[int], count: int) -> None:
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    rank = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    engine = LLM(
        base,
        enable_lora=True,
        max_lora_rank=next((most for most in MAX_RANKS if most >= rank), rank),
        max_model_len=len(prompt) + count,
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=2**30,  # for one short prompt; by default it takes most of the machine
        skip_tokenizer_init=True,
    )
    made = engine.generate(
        [{"prompt_token_ids": prompt}],
        SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False),
        lora_request=LoRARequest("adapter", 1, folder),
    )
    sys.stdout.write(MARK + json.dumps([*made[0].outputs[0].token_ids]) + "\n")


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
