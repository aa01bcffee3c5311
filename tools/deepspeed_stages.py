"""DeepSpeed's ZeRO stages train adapters as one process does. Not part of the tests: DeepSpeed builds C++ on first use.

uv run --with deepspeed --with setuptools torchrun --nproc-per-node 2 --standalone tools/deepspeed_stages.py
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

import lora_lite as ll

VARIANTS = ("lora", "hra", "dora")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 16), nn.Linear(16, 20)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


def ids(seed: int) -> Tensor:
    return torch.randint(20, (4, 5), generator=torch.Generator().manual_seed(seed))


def adapted(variant: str) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net()
    adapter = ll.attach(model, ll.LoraLiteConfig(variant=variant, r=4, target_names=("layers",)))
    return model, torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.0)


def train(model: Any, rows: slice, step: Any) -> Tensor:
    for seed in range(4):
        batch = ids(seed)[rows]
        step(nn.functional.cross_entropy(model(batch).flatten(0, 1), batch.flatten()))
    with torch.no_grad():
        return model(ids(9)).detach().clone()


def alone(variant: str) -> Tensor:
    model, optimizer = adapted(variant)

    def step(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train(model, slice(None), step)


def with_stage(variant: str, stage: int, rank: int, folder: Path) -> Tensor:
    model, optimizer = adapted(variant)
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    settings = {"train_micro_batch_size_per_gpu": 2, "train_batch_size": 4, "zero_optimization": zero}
    settings |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]

    def step(loss: Tensor) -> None:
        engine.backward(loss)
        engine.step()

    found = train(engine, slice(2 * rank, 2 * rank + 2), step)
    parameters = [*model.parameters()] if stage == 3 else []
    with deepspeed.zero.GatheredParameters(parameters, enabled=stage == 3):
        ll.save(model, folder / f"{variant}{rank}.safetensors")
    return found


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
    rank = int(os.environ["RANK"])
    with tempfile.TemporaryDirectory() as made:
        for stage in (1, 2, 3):
            for variant in VARIANTS:
                found = with_stage(variant, stage, rank, Path(made))
                torch.testing.assert_close(found, alone(variant), rtol=1e-4, atol=1e-5)
                torch.manual_seed(0)
                again = Net()
                ll.load(again, Path(made) / f"{variant}{rank}.safetensors")
                torch.testing.assert_close(again(ids(9)).detach(), found, rtol=1e-4, atol=1e-5)
                if rank == 0:
                    print(f"ZeRO-{stage} {variant}: as one process; saved and loaded")
