"""axolotl and ms-swift with the plugins that README shows, each in an environment of its own with its pin of PEFT
overridden: gigabytes to install, so that .ci/run leaves it out; type: pytest -m exhaustive integrations/lora_lite_peft"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

import lora_lite as ll

pytestmark = pytest.mark.exhaustive
ROOT = Path(__file__).parents[3]
README = (ROOT / "integrations/lora_lite_peft/README.md").read_text(encoding="utf-8")
OURS = [ROOT, ROOT / "integrations/lora_lite_peft", ROOT / "plugins/lora_lite_ortho"]
AXOLOTL = """
base_model: base
plugins: [lora_lite_plugin.LoraLitePlugin]
adapter: lora_lite
datasets: [{path: tokens.jsonl, ds_type: json, type: }]
output_dir: out
val_set_size: 0
sequence_len: 32
micro_batch_size: 2
gradient_accumulation_steps: 1
max_steps: 2
save_steps: 1
learning_rate: 0.01
optimizer: adamw_torch
lr_scheduler: constant
bf16: false
fp16: false
tf32: false
attn_implementation: eager
dataset_prepared_path: prepared
"""


@pytest.fixture
def folder(llama: Any, tmp_path: Path) -> Path:
    """A base with its tokenizer, and data."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    vocabulary = {word: n for n, word in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"])}
    vocabulary |= {f"w{n}": n + 4 for n in range(90)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<|endoftext|>", eos_token="<|im_end|>", unk_token="<unk>"
    ).save_pretrained(tmp_path / "base")
    small = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "bos_token_id": 0, "eos_token_id": 2}
    Qwen2ForCausalLM(Qwen2Config(**small, **heads)).save_pretrained(tmp_path / "base")
    rows = [[4 + (7 * i + j) % 90 for j in range(8)] for i in range(16)]
    tokens = [{"input_ids": row, "attention_mask": [1] * 8, "labels": row} for row in rows]
    talks = [[{"role": "user", "content": f"w{i}"}, {"role": "assistant", "content": f"w{i + 1}"}] for i in range(16)]
    for name, lines in (("tokens", tokens), ("talks", [{"messages": talk} for talk in talks])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (tmp_path / "axolotl.yml").write_text(AXOLOTL, encoding="utf-8")
    (tmp_path / "override.txt").write_text("peft>=0.21,<0.22\n", encoding="utf-8")
    return tmp_path


PROGRAMS = {
    "axolotl": ["python", "-m", "axolotl.cli.train", "axolotl.yml"],
    "ms-swift": [
        "swift", "sft", "--external_plugins", "lora_lite_plugin.py", "--tuner_type", "lora_lite", "--model", "base",
        "--model_type", "qwen2", "--template", "qwen", "--dataset", "talks.jsonl", "--output_dir", "out", "--max_steps", "2",
        "--save_steps", "1", "--torch_dtype", "float32", "--use_hf", "true", "--split_dataset_ratio", "0", "--report_to", "none",
    ],
}  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program(program: str, folder: Path) -> None:
    word = {"axolotl": "BasePlugin", "ms-swift": "tuners_map"}[program]
    (plugin,) = [block for block in re.findall(r"^```py\n(.*?)^```", README, flags=re.M | re.S) if word in block]
    (folder / "lora_lite_plugin.py").write_text(plugin, encoding="utf-8")
    own = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")}
    offline = {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "."}

    def run(*command: Any, **more: str) -> None:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=folder,
            env={**own, **more},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]

    run("uv", "venv", "--python", "3.11", "venv")
    run("uv", "pip", "install", "--python", "venv/bin/python", "--override", "override.txt", program, *OURS)
    command, *arguments = PROGRAMS[program]
    run(folder / "venv/bin" / command, *arguments, **offline)
    saved = sorted((folder / "out").rglob("adapter_model.safetensors"))
    assert len(saved) >= 2
    assert {ll.inspect(path).variant for path in saved} == {"hra"}
    assert not list((folder / "out").rglob("model.safetensors"))
