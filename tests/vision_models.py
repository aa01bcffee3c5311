"""A diffusers UNet and a timm ConvNeXt: attached, trained, saved, loaded, merged. Run by tests/test_packaging.py."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import lora_lite as ll

IMAGE, PICTURE, TEXT = torch.randn(1, 4, 16, 16), torch.randn(1, 3, 64, 64), torch.randn(1, 5, 16)


def unet() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        norm_num_groups=8,
        attention_head_dim=8,
    ).eval()


def convnext() -> nn.Module:
    return timm.create_model("convnext_atto", pretrained=False, num_classes=10).eval()


def check(make: Callable[[], nn.Module], run: Callable[[Any], Tensor], cfg: ll.AdapterConfig) -> None:
    base = make()
    state = copy.deepcopy(base.state_dict())
    with torch.no_grad():
        frozen = run(base)
    adapter = ll.attach(base, cfg)
    with torch.no_grad():
        assert torch.equal(run(base), frozen)
    assert "convolution" in {target.kind for target in adapter.layers().values()}
    optimizer, losses = torch.optim.AdamW(adapter.parameters(), lr=1e-3), []
    for _ in range(4):
        loss = run(base).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        y, path = run(base), Path(folder) / "adapter.safetensors"
        ll.save(base, path)
        again = make()
        again.load_state_dict(state)
        ll.load(again, path)
        assert torch.equal(run(again), y)
        ll.merge(base)
        torch.testing.assert_close(run(base), y, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    torch.manual_seed(0)
    for Config in (ll.LoRAConfig, ll.DoRAConfig):
        check(
            unet,
            lambda model: model(IMAGE, 10, encoder_hidden_states=TEXT).sample,
            Config(r=4, target_names=("conv", "to_q", "to_v", "proj_in")),
        )
        check(
            convnext,
            lambda model: model(PICTURE),
            Config(r=4, target_names=(r"stem\.0", r"downsample\.1", "fc1", "fc2")),
        )
    try:
        ll.attach(convnext(), ll.LoRAConfig(r=4, target_names=("conv_dw",)))
    except ll.UnsupportedLayer as error:
        assert "groups=40" in str(error)  # noqa: PT017
    else:
        raise AssertionError("a convolution in groups was not refused")
