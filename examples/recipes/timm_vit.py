"""A timm vision transformer with an adapter, a new head, and a moving average of both. See docs/recipes.md."""

import argparse

import timm
import torch
from timm.utils import ModelEmaV3

import lora_lite as ll

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="name of a pretrained ViT; a small one is made where it is left out")
parser.add_argument("--variant", default="pissa")
parser.add_argument("--out", default="vit-adapter.safetensors")
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"


def base():
    torch.manual_seed(0)  # the new head is drawn
    if args.model:
        return timm.create_model(args.model, pretrained=True, num_classes=4).to(device)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", num_classes=4, **sizes).to(device)


model = base()
cfg = ll.LoraLiteConfig(
    variant=args.variant,
    target_names=(r"attn\.qkv", r"attn\.proj", r"mlp\.fc"),
    train_modules=(r"^head$",),
)
ll.attach(model, cfg)
average = ModelEmaV3(model, decay=0.9)
optimizer = torch.optim.AdamW(ll.param_groups(model, lr=3e-3, weight_decay=0.05))
ll.follow(model, optimizer)

torch.manual_seed(1)
labels = torch.arange(16, device=device) % 4  # stand for your data
images = torch.randn(16, 3, *model.patch_embed.img_size, device=device) + labels[:, None, None, None]
losses = []
model.train()
for step in range(20):
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    (loss + ll.penalty(model)).backward()
    optimizer.step()
    optimizer.zero_grad()
    average.update(model, step)
    losses.append(loss.item())
    print(f"step {step}: loss {losses[-1]:.4f}")
assert losses[-1] < losses[0], losses

ll.save(average.module, args.out)

again = base()
print(ll.load(again, args.out))
with torch.no_grad():
    torch.testing.assert_close(again.eval()(images), average.module.eval()(images))
