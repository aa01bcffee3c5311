"""Two processes train together (DDP) as one does with the double batch."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
SCRIPT = """
import os, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
import lora_lite as ll
from lora_lite_transformers import AdapterTrainer


class Adapted(AdapterTrainer, Trainer):
    pass


def model():
    torch.manual_seed(0)
    made = LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    ll.attach(made, ll.HRAConfig(r=2, orthogonality=0.1))
    return made


rows = [{"input_ids": torch.arange(i, i + 8), "labels": torch.arange(i, i + 8)} for i in range(32)]
arguments = TrainingArguments(
    sys.argv[1], max_steps=4, save_steps=2, per_device_train_batch_size=int(sys.argv[2]), learning_rate=1e-2,
    report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, ddp_find_unused_parameters=False,
)
Adapted(model(), arguments, train_dataset=rows).train()
Adapted(model(), arguments, train_dataset=rows).train(resume_from_checkpoint=sys.argv[1] + "/checkpoint-2")
if torch.distributed.is_initialized():  # or a thread of torch's own may abort the process as the interpreter ends
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)
"""


def test_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    for start, folder, size in (([sys.executable], "one", "8"), (launch, "two", "4")):
        done = subprocess.run(
            [*start, str(script), str(tmp_path / folder), size],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "two/checkpoint-4/rng_state_1.pth").exists()
    one, two, before = (
        load_file(tmp_path / folder / "adapters/default.safetensors")
        for folder in ("one/checkpoint-4", "two/checkpoint-4", "one/checkpoint-2")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-6)
        assert not torch.equal(before[name], tensor)
