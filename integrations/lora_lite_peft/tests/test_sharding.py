"""FSDP2 over two processes: attach, shard, train, save what was gathered."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SCRIPT = """
import os
import sys
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
import lora_lite as ll
from lora_lite_peft import LoraLiteConfig

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
tokens = torch.randint(3, 100, (4, 8), generator=torch.Generator().manual_seed(0))

def base():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config)

def train(model, rows):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

for variant in ("lora", "hra", "pissa"):
    config = LoraLiteConfig(variant=variant, r=2, task_type="CAUSAL_LM")
    alone, model = get_peft_model(base(), config), get_peft_model(base(), config)
    train(alone, tokens)
    for block in model.get_base_model().model.layers:
        fully_shard(block)
    fully_shard(model)
    train(model, tokens[2 * rank : 2 * rank + 2])
    try:
        model.save_pretrained(f"{folder}/{variant}", is_main_process=rank == 0)
    except ll.ModelStateError as error:
        assert "is sharded; give the gathered values" in str(error), error
    else:
        raise SystemExit("a sharded adapter was saved")
    dist.barrier()
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    assert bool(gathered) == (rank == 0)
    model.save_pretrained(f"{folder}/{variant}", state_dict=gathered, is_main_process=rank == 0)
    dist.barrier()
    again = PeftModel.from_pretrained(base(), f"{folder}/{variant}")
    torch.testing.assert_close(again(tokens).logits, alone(tokens).logits, rtol=0, atol=1e-6)
    with model.disable_adapter():
        torch.testing.assert_close(model(tokens).logits, base()(tokens).logits, rtol=0, atol=1e-6)
    dist.barrier()
dist.destroy_process_group()
os._exit(0)  # a thread of gloo that still holds a tensor as Python ends would abort the process
"""


def test_fsdp2(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "script.py")]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)[-4000:]
