"""SFT, then DPO, with TRL on one base: the reference is a view of it. See docs/recipes.md."""

import argparse

import torch
from datasets import Dataset
from lora_lite_transformers import AdapterTrainer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import lora_lite as ll

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="name or folder; a small one is made where it is left out")
parser.add_argument("--variant", default="hra")
parser.add_argument("--out", default="sft-dpo")
args = parser.parse_args()

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def small(folder):
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *NUMBERS])}
    words = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(folder)
    return folder


class SFT(AdapterTrainer, SFTTrainer):
    pass


class DPO(AdapterTrainer, DPOTrainer):
    pass


source = args.model or small(f"{args.out}/base")
tokenizer = AutoTokenizer.from_pretrained(source)
counted = [[NUMBERS[(start + i) % 10] for i in range(6)] for start in range(10)]  # counting stands for your data
texts = [{"text": " ".join(words)} for words in counted]
pairs = [{"prompt": " ".join(words[:5]), "chosen": f" {words[5]}", "rejected": " zero zero"} for words in counted]
usual = {"max_steps": 20, "per_device_train_batch_size": 5, "logging_steps": 1, "report_to": []}
usual |= {"save_strategy": "no", "bf16": torch.cuda.is_available()}

model = AutoModelForCausalLM.from_pretrained(source)
ll.attach(model, ll.LoraLiteConfig(variant=args.variant))
sft = SFT(
    model,
    SFTConfig(f"{args.out}/sft", learning_rate=1e-2, **usual),
    train_dataset=Dataset.from_list(texts),
    processing_class=tokenizer,
)
sft.train()
sft.save_model()

dpo = DPO(  # goes on with the same adapter; the reference is the adapter as SFT has left it
    model,
    args=DPOConfig(f"{args.out}/dpo", learning_rate=1e-3, **usual),
    train_dataset=Dataset.from_list(pairs),
    processing_class=tokenizer,
)
dpo.train()
dpo.save_model()
losses = [entry["loss"] for entry in dpo.state.log_history if "loss" in entry]
print(f"DPO's first loss {losses[0]:.4f}, last {losses[-1]:.4f}")
assert f"{losses[0]:.4f}" == "0.6931", losses  # ln 2: at first the model is its own reference
assert losses[-1] < losses[0], losses

again = AutoModelForCausalLM.from_pretrained(source).to(model.device)
print(ll.load(again, f"{args.out}/dpo"))
batch = tokenizer(texts[0]["text"], return_tensors="pt").input_ids.to(model.device)
with torch.no_grad():
    torch.testing.assert_close(again.eval()(batch).logits, model.eval()(batch).logits)
