"""A diffusers UNet with an adapter on attention and convolutions, and its moving average. See docs/recipes.md."""

import argparse

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel

import lora_lite as ll

parser = argparse.ArgumentParser()
parser.add_argument(
    "--model", help="name or folder of a pipeline with a UNet; a small one is made where it is left out"
)
parser.add_argument("--variant", default="dora")
parser.add_argument("--out", default="unet-adapter.safetensors")
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"


def base():
    if args.model:
        return UNet2DConditionModel.from_pretrained(args.model, subfolder="unet").to(device)
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        norm_num_groups=8,
        attention_head_dim=8,
    ).to(device)


unet = base()
targets = ("to_q", "to_k", "to_v", r"to_out\.0", r"resnets\.\d+\.conv")
adapter = ll.attach(unet, ll.LoraLiteConfig(variant=args.variant, target_names=targets))
optimizer = torch.optim.AdamW(ll.param_groups(unet, lr=1e-3, weight_decay=0.01))
ll.follow(unet, optimizer)
average = EMAModel(adapter.parameters(), decay=0.9)

torch.manual_seed(1)
scheduler, size = DDPMScheduler(), unet.config.sample_size
images = torch.randn(4, unet.config.in_channels, size, size, device=device)  # stands for your pictures' latents
texts = torch.randn(4, 7, unet.config.cross_attention_dim, device=device)  # and for their captions
losses = []
unet.train()
for step in range(20):
    noise, times = torch.randn_like(images), torch.randint(0, 1000, (4,), device=device)
    noisy = scheduler.add_noise(images, noise, times)
    loss = (unet(noisy, times, texts).sample - noise).square().mean()
    (loss + ll.penalty(unet)).backward()
    optimizer.step()
    optimizer.zero_grad()
    average.step(adapter.parameters())
    losses.append(loss.item())
    print(f"step {step}: loss {losses[-1]:.4f}")
assert losses[-1] < losses[0], losses

average.copy_to(adapter.parameters())
ll.save(unet, args.out)

again = base()
print(ll.load(again, args.out))
with torch.no_grad():
    torch.testing.assert_close(again.eval()(images, 10, texts).sample, unet.eval()(images, 10, texts).sample)
