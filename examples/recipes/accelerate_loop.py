"""A training loop of your own with accelerate, on any number of processes. See docs/recipes.md."""

import argparse

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lora_lite as ll

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="name or folder; a small one is made where it is left out")
parser.add_argument("--variant", default="lora")
parser.add_argument("--resume", help="folder of a saved state, as accelerate-run/state")
parser.add_argument("--out", default="accelerate-run")
args = parser.parse_args()


def base():
    if args.model:
        return AutoModelForCausalLM.from_pretrained(args.model)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes))


accelerator = Accelerator(gradient_accumulation_steps=2)
plain = base()
ll.attach(plain, ll.LoraLiteConfig(variant=args.variant))
optimizer = torch.optim.AdamW(ll.param_groups(plain, lr=1e-2, weight_decay=0.01))
tokens = (torch.arange(128)[:, None] + torch.arange(16)) % plain.config.vocab_size  # counting stands for your data
model, optimizer, batches = accelerator.prepare(plain, optimizer, DataLoader(tokens, batch_size=8))
ll.follow(plain, optimizer)
if args.resume:
    accelerator.load_state(args.resume)

model.train()
for epoch in range(2):
    losses = []
    for ids in batches:
        with accelerator.accumulate(model):
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss + ll.penalty(plain))
            optimizer.step()
            optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach()).mean().item())
    accelerator.print(f"epoch {epoch}: loss {sum(losses) / len(losses):.4f}")
accelerator.save_state(f"{args.out}/state")
if accelerator.is_main_process:
    ll.save(plain, f"{args.out}/adapter.safetensors")
accelerator.wait_for_everyone()

again = base().to(accelerator.device)
accelerator.print(ll.load(again, f"{args.out}/adapter.safetensors"))
ids = tokens[:4].to(accelerator.device)
with torch.no_grad():
    torch.testing.assert_close(again.eval()(ids).logits, plain.eval()(ids).logits)
accelerator.end_training()
