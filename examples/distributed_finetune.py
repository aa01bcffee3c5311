"""Fine-tune a causal language model on several processes with FSDP2: nobody holds the whole model but the first, once.

    torchrun --nproc-per-node 2 examples/distributed_finetune.py --out adapter.safetensors
    torchrun --nproc-per-node 2 examples/distributed_finetune.py --resume adapter.safetensors --out more.safetensors

With GPUs each process takes one, else all are on the CPU. --model is a name or a folder that transformers loads;
without it a small model is made on the spot. --data is a file of text; without it the model learns to count.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import lora_lite as ll

SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
LENGTH = 16  # tokens of a row


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="name or folder of a model; a small one is made where it is left out")
    parser.add_argument("--data", type=Path, help="a file of text")
    parser.add_argument("--variant", default="lora")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch for each process")
    parser.add_argument("--out", type=Path, required=True, help="the adapter's .safetensors file")
    parser.add_argument("--resume", type=Path, help="an adapter file to go on from")
    args = parser.parse_args()
    if args.data and not args.model:
        parser.error("--data needs --model, whose tokenizer reads the text")
    return args


def sharded_model(args: argparse.Namespace, cfg: ll.AdapterConfig, device: torch.device) -> nn.Module:
    """On meta: build, attach, shard. Then memory for the shards, and the base's weights from the first process."""
    config = AutoConfig.from_pretrained(args.model) if args.model else LlamaConfig(**SMALL, num_attention_heads=4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    ll.attach(model, cfg)
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    for block in blocks:
        fully_shard(block)
    fully_shard(model)
    model.to_empty(device=device)

    whole = None
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        source = args.model and AutoModelForCausalLM.from_pretrained(args.model)
        whole = source or AutoModelForCausalLM.from_config(config)
    weights = whole.state_dict() if whole is not None else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, weights, options=options)
    buffers = dict(whole.named_buffers()) if whole is not None else {}  # those that no checkpoint has, as RoPE's
    for name, buffer in model.named_buffers():
        if not name.rpartition(".")[2].startswith("lora_"):
            if name in buffers:
                buffer.copy_(buffers[name])
            dist.broadcast(buffer, src=0)
    return model


def batches(args: argparse.Namespace, vocabulary: int) -> Any:
    """Another part of the data for each process."""
    if args.data:
        text = args.data.read_text(encoding="utf-8")
        ids = AutoTokenizer.from_pretrained(args.model)(text, return_tensors="pt").input_ids[0]
        rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    else:
        rows = (torch.arange(256)[:, None] + torch.arange(LENGTH)) % vocabulary
    place = torch.Generator().manual_seed(dist.get_rank())
    while True:
        yield rows[torch.randint(len(rows), (args.rows,), generator=place)]


def main() -> None:
    args = parsed()
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    ranked = issubclass(ll.get_variant(args.variant).Config, ll.RankConfig)
    cfg = ll.LoraLiteConfig(variant=args.variant, **({"r": args.rank} if ranked else {}))
    model = sharded_model(args, cfg, device)
    if args.resume:
        ll.load(model, args.resume)
    else:
        ll.adapters(model)["default"].initialize()

    optimizer = torch.optim.AdamW(ll.param_groups(model, lr=args.lr))
    ll.follow(model, optimizer)
    source = batches(args, model.config.vocab_size)
    for step in range(args.steps):
        ids = next(source).to(device)
        loss = model(input_ids=ids, labels=ids).loss
        (loss + ll.penalty(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            print(f"step {step}: loss {float(mean) / dist.get_world_size():.4f}", flush=True)
    ll.save(model, args.out)
    dist.barrier()
    dist.destroy_process_group()
    if not on_gpu:
        os._exit(0)  # a thread of gloo that still holds a tensor as Python ends would abort the process


if __name__ == "__main__":
    main()
