"""A sentence encoder with an adapter, in sentence-transformers' own trainer. See docs/recipes.md."""

import argparse

import torch
from datasets import Dataset
from lora_lite_transformers import AdapterTrainer
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertModel, BertTokenizer

import lora_lite as ll

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="name or folder; a small one is made where it is left out")
parser.add_argument("--variant", default="oft")
parser.add_argument("--out", default="encoder")
args = parser.parse_args()

ANIMALS = ["cat", "dog", "cow", "pig", "hen", "fox", "owl", "bat", "ant", "bee"]
PLACES = ["house", "yard", "barn", "sty", "coop", "den", "tree", "cave", "hill", "hive"]


def small(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *ANIMALS, *PLACES]
    BertTokenizer({word: i for i, word in enumerate(words)}).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=len(words), initializer_range=0.2, **sizes)).save_pretrained(folder)
    encoder = Transformer(folder)
    SentenceTransformer(modules=[encoder, Pooling(encoder.get_embedding_dimension())]).save(folder)
    return folder


class EncoderTrainer(AdapterTrainer, SentenceTransformerTrainer):
    pass


source = args.model or small(f"{args.out}/base")
model = SentenceTransformer(source)
ll.attach(model, ll.LoraLiteConfig(variant=args.variant))
rows = [{"anchor": animal, "positive": place} for animal, place in zip(ANIMALS, PLACES, strict=True)]  # for your data
trainer = EncoderTrainer(
    model,
    SentenceTransformerTrainingArguments(
        args.out, max_steps=30, per_device_train_batch_size=10, learning_rate=1e-2, logging_steps=5, report_to=[]
    ),
    train_dataset=Dataset.from_list(rows),
    loss=MultipleNegativesRankingLoss(model),
)
trainer.train()
trainer.save_model()  # adapters/default.safetensors in the folder, nothing of the base
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
assert losses[-1] < losses[0], losses

again = SentenceTransformer(source)
print(ll.load(again, args.out))
torch.testing.assert_close(again.encode(ANIMALS), model.encode(ANIMALS))
