"""QLoRA with transformers' Trainer: an adapter on a 4-bit base. See docs/recipes.md."""

import argparse

import torch
from lora_lite_transformers import AdapterTrainer
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import lora_lite as ll

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="name or folder; a small one is made where it is left out")
parser.add_argument("--variant", default="lora")
parser.add_argument("--out", default="qlora")
args = parser.parse_args()


def small(folder):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes)).save_pretrained(folder)
    return folder


source = args.model or small(f"{args.out}/base")
four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def base():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=four_bit, device_map=device)


class QLoRATrainer(AdapterTrainer, Trainer):
    pass


model = base()
ll.attach(model, ll.LoraLiteConfig(variant=args.variant))
tokens = (torch.arange(64)[:, None] + torch.arange(16)) % model.config.vocab_size  # counting stands for your data
trainer = QLoRATrainer(
    model,
    TrainingArguments(
        args.out,
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        logging_steps=5,
        report_to=[],
    ),
    train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
)
trainer.train()
trainer.save_model()  # adapters/default.safetensors in the folder, nothing of the base
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
assert losses[-1] < losses[0], losses

again = base()
print(ll.load(again, args.out))
batch = tokens[:4].to(model.device)
with torch.no_grad():
    torch.testing.assert_close(again(batch).logits, model.eval()(batch).logits)
