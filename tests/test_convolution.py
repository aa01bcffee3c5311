"""Convolutions as linear layers on patches: every variant, against the convolution with the merged weight."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite_core.layers.kinds.convolution import Patches, patches

from .usual import SPREAD

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SMALL: dict[str, dict[str, Any]] = {"oft": {"block_size": 4}, "antipasto": {"r": 4}, "ssvd": {"r": 4}}
FILE = "adapter.safetensors"


def model(dims: int, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    kind: Any = KINDS[dims]
    mode = "circular" if dims < 3 else "zeros"
    first = kind(4, 8, 3, stride=2, padding=1)
    return nn.Sequential(first, nn.Tanh(), kind(8, 4, 2, padding="same", dilation=2, padding_mode=mode)).to(dtype)


def plain(dims: int) -> nn.Sequential:
    """What PEFT's adapters of convolutions can run on: no dilation, zeros around."""
    torch.manual_seed(0)
    kind: Any = KINDS[dims]
    return nn.Sequential(kind(4, 8, 3, stride=2, padding=1), nn.Tanh(), kind(8, 4, 3, padding="same"))


def images(dims: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 4, *(9, 8, 7)[:dims], generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        dtype
    )


def config(name: str, **fields: Any) -> ll.AdapterConfig:
    rank = {"r": 4} if issubclass(ll.get_variant(name).Config, ll.RankConfig) else {}
    return ll.LoraLiteConfig(variant=name, target_names=("0", "2"), **{**rank, **SMALL.get(name, {}), **fields})


def attach(base: nn.Module, cfg: ll.AdapterConfig, x: Tensor) -> ll.Adapter:
    try:
        return ll.attach(base, cfg)
    except ll.CalibrationError:
        return ll.attach(base, cfg, calibration_data=[x])


def moved(adapter: ll.Adapter) -> None:
    torch.manual_seed(2)
    for parameter in adapter.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("dims", KINDS)
def test_patches_times_the_flat_weight_are_the_convolution(dims: int) -> None:
    for number in (0, 2):
        layer: Any = model(dims)[number]
        x = torch.randn(3, layer.in_channels, *(9, 8, 7)[:dims], dtype=torch.float64)
        rows = nn.functional.linear(patches(layer, x), ll.dense_weight(layer), layer.bias)
        torch.testing.assert_close(rows.movedim(-1, 1), layer(x))
        torch.testing.assert_close(patches(layer, x[0]), patches(layer, x)[0])


@pytest.mark.parametrize("dims", KINDS)
@pytest.mark.parametrize("name", [name for name in SPREAD if name != "trainable_tokens"])
def test_every_variant_is_what_the_merged_weight_computes(name: str, dims: int, tmp_path: Path) -> None:
    base, x = model(dims), images(dims)
    frozen = base(x).detach()
    adapter = attach(base, config(name), x)
    tolerance = ll.get_variant(name).identity_atol
    assert float((base(x) - frozen).abs().max().detach()) <= tolerance
    moved(adapter)
    y = base(x)
    assert float((y - frozen).abs().max().detach()) > 1e-3
    y.square().mean().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    y = y.detach()
    with ll.disabled(base):
        assert torch.equal(base(x), frozen)
    ll.save(base, tmp_path / FILE)
    again = model(dims)
    ll.load(again, tmp_path / FILE)
    torch.testing.assert_close(again(x).detach(), y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(copy.deepcopy(base)(x).detach(), y)
    ll.merge(base)
    assert [type(layer) for layer in base] == [type(layer) for layer in model(dims)]
    torch.testing.assert_close(base(x), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["lora", "hra", "ia3_ff", "dora"])
def test_bfloat16_autocast_compile_and_one_image(name: str) -> None:
    base, x = model(2, torch.float32), images(2, torch.float32)
    adapter = attach(base, config(name), x)
    moved(adapter)
    expected = base(x).detach()
    torch.testing.assert_close(base(x[0]).detach(), expected[0], rtol=1e-4, atol=1e-5)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(base, fullgraph=True, backend="aot_eager")(x).detach(), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = base(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.05)
    low = base.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dora", [False, True])
def test_peft_computes_the_same_both_ways(dora: bool, dims: int, tmp_path: Path) -> None:
    base, x = plain(dims), images(dims, torch.float32)
    adapter = ll.attach(base, config("dora" if dora else "lora", alpha=8))
    moved(adapter)
    expected = base(x).detach()
    ll.export_peft(base, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = peft.PeftModel.from_pretrained(plain(dims), str(tmp_path / "ours"))
    torch.testing.assert_close(theirs(x), expected, rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    back = plain(dims)
    ll.import_peft(back, tmp_path / "theirs")
    torch.testing.assert_close(back(x).detach(), expected, rtol=1e-4, atol=1e-5)


def test_any_low_rank_change_as_a_lora(tmp_path: Path) -> None:
    base, x = plain(2), images(2, torch.float32)
    moved(attach(base, config("pissa", r=1), x))
    ll.export_lora(base, tmp_path / "lora")
    theirs = peft.PeftModel.from_pretrained(plain(2), str(tmp_path / "lora"))
    torch.testing.assert_close(theirs(x), base(x).detach(), rtol=1e-4, atol=1e-5)
    dilated = model(2, torch.float32)
    ll.attach(dilated, config("lora"))
    with pytest.raises(
        ll.MergeError, match=r"dilation=\(2, 2\) and padding_mode='circular': PEFT's adapters run without"
    ):
        ll.export_peft(dilated, tmp_path / "dilated")


@pytest.mark.parametrize(
    ("name", "fields", "told"),
    [
        ("fourierft", {"n_frequency": 9}, "PEFT's FourierFT takes no Conv2d"),
        ("waveft", {"n_frequency": 9}, "PEFT's WaveFT takes no Conv2d"),
        ("poly", {}, r"PEFT's Poly takes nn\.Linear layers, not a Conv2d"),
        ("road", {}, r"PEFT's RoAd takes nn\.Linear layers, not a Conv2d"),
    ],
)
def test_methods_that_peft_has_not_for_convolutions(name: str, fields: Any, told: str, tmp_path: Path) -> None:
    base = plain(2)
    ll.attach(base, config(name, **fields))
    with pytest.raises(ll.MergeError, match=told):
        ll.export_peft(base, tmp_path / "none")


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.depthwise = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.depthwise(self.conv(x)).mean((2, 3)))


def test_they_are_targets_only_where_they_are_named() -> None:
    base, x = Vision(), torch.randn(2, 3, 9, 9)
    assert ll.attach(base, ll.LoRAConfig(r=2)).targets == ("head",)
    ll.detach(base)
    assert ll.attach(base, ll.LoRAConfig(r=2, target_names=("conv", "head"))).targets == ("conv", "head")
    seen = ll.coverage(base, x)
    assert seen.fired == ("conv", "head")
    assert "depthwise.weight" in seen.beyond
    assert "conv.weight" not in seen.beyond
    ll.detach(base)
    message = (
        "depthwise is a Conv2d with groups=8, whose patches do not go through one weight, as variant 'lora' needs it"
    )
    with pytest.raises(ll.UnsupportedLayer, match=message):
        ll.attach(base, ll.LoRAConfig(r=2, target_names=("conv", "depthwise")))
    assert not ll.adapters(base)
    with pytest.raises(ll.TargetError, match="the model is itself a Conv2d; wrap it"):
        ll.attach(base.conv, ll.LoRAConfig(r=2))


def test_a_network_of_transformers_trains_reloads_and_merges(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}

    def network() -> Any:
        torch.manual_seed(0)
        made = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, num_labels=3))
        return made.eval()

    base, x, labels = network(), torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 0, 1, 2])
    cfg = ll.LoRAConfig(r=4, target_names=("convolution",), train_modules=("classifier",))
    adapter = ll.attach(base, cfg)
    assert len(adapter.targets) > 5
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = base(x, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    expected = base(x).logits.detach()
    ll.save(base, tmp_path / FILE)
    again = network()
    ll.load(again, tmp_path / FILE)
    torch.testing.assert_close(again(x).logits.detach(), expected, rtol=1e-4, atol=1e-4)
    ll.merge(again)
    torch.testing.assert_close(again(x).logits.detach(), expected, rtol=1e-3, atol=1e-3)


def test_patches_are_made_where_they_are_needed_and_not_before() -> None:
    layer: Any = model(2)[2]
    image = torch.randn(2, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    x, made = Patches.of(layer, image), patches(layer, image)
    A = torch.randn(3, made.shape[-1], dtype=torch.float64)
    bias = torch.randn(3, dtype=torch.float64)
    for compute in (
        lambda x: nn.functional.linear(x, A),
        lambda x: nn.functional.linear(x, A, bias),
        lambda x: x @ A.T,
        lambda x: torch.matmul(x, A.T),
        lambda x: x * 2 + 1,
        lambda x: torch.einsum("...i,ri->...r", x, A),
        lambda x: x.flatten(0, -2).sum(0),
        lambda x: x.float(),
        lambda x: nn.functional.linear(x.to(torch.float32), A.float()),
        lambda x: torch.cat([x, x], -1),
    ):
        got, expected = compute(x), compute(made)
        assert type(got) is Tensor
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        ours, theirs = (torch.autograd.grad(one.square().sum(), image, retain_graph=True)[0] for one in (got, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert x.shape == made.shape
    assert (x.dtype, x.device, x.dim(), len(x)) == (made.dtype, made.device, made.dim(), len(made))


@pytest.mark.parametrize("name", ["lora", "hra", "ia3"])
def test_the_output_lies_in_memory_as_the_frozen_layers(name: str) -> None:
    base, x = model(2), images(2)
    strides = base[0](x).stride()
    attach(base, config(name), x)
    assert base[0](x).stride() == strides
    turned = x.to(memory_format=torch.channels_last)
    assert base[0](turned).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dims", KINDS)
def test_dropout_is_pefts_from_the_same_draw(dims: int) -> None:
    base, x = plain(dims).train(), images(dims, torch.float32)
    adapter = ll.attach(base, config("lora", alpha=8, dropout=0.5))
    moved(adapter)
    cfg = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, target_modules=["0", "2"])
    theirs = peft.get_peft_model(plain(dims), cfg).train()
    for name, target in adapter.layers().items():
        inner = theirs.base_model.model.get_submodule(name)
        for factor in "AB":
            weight = inner.get_submodule(f"lora_{factor}.default").weight
            weight.data.copy_(target.params[f"lora_{factor}"].detach().reshape(weight.shape))
    outputs = []
    for run in (base, theirs):
        torch.manual_seed(3)
        outputs.append(run(x).detach())
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    torch.manual_seed(4)
    assert not torch.allclose(base(x).detach(), outputs[0])


@pytest.mark.parametrize("name", ["ia3", "road"])
def test_in_groups_what_looks_at_outputs_alone_is_exact(name: str) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(8, 8, 3, groups=4, padding=1), nn.Conv2d(8, 8, 3, groups=8)).double()
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    frozen = base(x).detach()
    adapter = ll.attach(base, ll.LoraLiteConfig(variant=name, target_names=("0", "1")))
    assert torch.equal(base(x), frozen)
    moved(adapter)
    y = base(x).detach()
    assert not torch.allclose(y, frozen)
    if name == "road":  # it turns pairs of outputs, which lie in different groups
        with pytest.raises(ll.MergeError, match="the adapter of 0 mixes outputs of several groups"):
            ll.merge(base)
        return
    ll.merge(base)
    torch.testing.assert_close(base(x), y, rtol=1e-9, atol=1e-9)
