"""FourierFT, WaveFT and C3A against their sums, written out, and against the peft package."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lora_lite_sparse._wavelets import DAUBECHIES
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll
from tests.oracles import assert_same

SIZES = [(24, 16), (16, 24), (9, 15), (10, 7), (1, 6)]  # d_in, d_out


def entries(model: nn.Module, d_in: int) -> list[tuple[int, int]]:
    (target,) = ll.adapters(model)["default"].layers().values()
    return [(place // d_in, place % d_in) for place in target.params["lora_places"].tolist()]


def attached(cfg: Any, d_in: int, d_out: int, dtype: torch.dtype = torch.float64) -> tuple[Any, Any, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(d_in, d_out, dtype=dtype))
    for parameter in ll.attach(model, cfg).parameters():
        nn.init.normal_(parameter)
    return model, model[0], torch.randn(5, d_in, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_fourierft(sizes: tuple[int, int]) -> None:
    d_in, d_out = sizes
    model, layer, x = attached(ll.FourierFTConfig(n_frequency=6, scaling=70.0), d_in, d_out)
    spectrum = layer.lora_spectrum.detach().clone().requires_grad_()
    p, q = torch.arange(d_out).double()[:, None], torch.arange(d_in).double()
    change = torch.zeros(d_out, d_in, dtype=torch.float64)
    for value, (u, v) in zip(spectrum, entries(model, d_in), strict=True):
        change = change + value * torch.cos(2 * math.pi * (u * p / d_out + v * q / d_in)) / (d_in * d_out)
    expected = F.linear(x, layer.weight + 70 * change, layer.bias)
    assert_same(layer, x, expected, {"lora_spectrum": spectrum})


def test_fourierft_with_all_frequencies() -> None:
    model, layer, x = attached(ll.FourierFTConfig(n_frequency=60, scaling=2.0), 6, 10)
    F_ = torch.zeros(10, 6, dtype=torch.float64)
    for value, place in zip(layer.lora_spectrum.detach(), entries(model, 6), strict=True):
        F_[place] = value
    expected = F.linear(x, layer.weight + 2 * torch.fft.ifft2(F_).real, layer.bias)
    torch.testing.assert_close(layer(x), expected)


def synthesis(low: tuple[float, ...], count: int, high: bool) -> Tensor:
    """What a band of `count` coefficients gives, as a matrix, without the borders."""
    taps = len(low)
    filters = [(-1) ** i * low[taps - 1 - i] for i in range(taps)] if high else list(low)
    rows = 2 * count + 2 - taps
    R = torch.zeros(rows, count, dtype=torch.float64)
    for t in range(rows):
        for k in range(count):
            if 0 <= t + taps - 2 - 2 * k < taps:
                R[t, k] = filters[t + taps - 2 - 2 * k]
    return R


@pytest.mark.parametrize("family", ["db1", "db2", "db5"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_waveft(sizes: tuple[int, int], family: str) -> None:
    d_in, d_out = sizes
    model, layer, x = attached(ll.WaveFTConfig(n_frequency=6, scaling=3.0, wavelet_family=family), d_in, d_out)
    spectrum = layer.lora_spectrum.detach().clone().requires_grad_()
    low = DAUBECHIES[family]
    border = len(low) // 2 - 1
    height, width = d_out + d_out % 2 + 2 * border, d_in + d_in % 2 + 2 * border
    L, H = ([synthesis(low, size // 2, high) for size in (height, width)] for high in (False, True))
    change = torch.zeros(d_out, d_in, dtype=torch.float64)
    for value, (u, v) in zip(spectrum, entries(model, d_in), strict=True):
        right, k = divmod(v + border, width // 2)
        below, m = divmod(u + border, height // 2)
        first, second = H if right else L, H if below else L  # right: detail along rows; below: along columns
        change = change + value * torch.outer(first[0][:, m], second[1][:, k])[:d_out, :d_in]
    expected = F.linear(x, layer.weight + 3 * change, layer.bias)
    assert_same(layer, x, expected, {"lora_spectrum": spectrum})


def test_waveft_without_a_transform() -> None:
    model, layer, x = attached(ll.WaveFTConfig(n_frequency=6, scaling=3.0, use_idwt=False), 9, 15)
    change = torch.zeros(15, 9, dtype=torch.float64)
    for value, place in zip(layer.lora_spectrum.detach(), entries(model, 9), strict=True):
        change[place] = 3 * value
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight + change, layer.bias))


@pytest.mark.parametrize("name", DAUBECHIES)
def test_wavelets(name: str) -> None:
    """Orthogonal to their even shifts, and blind to polynomials of a degree below N."""
    low, N = DAUBECHIES[name], int(name[2:])
    assert len(low) == 2 * N
    for shift in range(N):
        product = sum(low[i] * low[i + 2 * shift] for i in range(2 * N - 2 * shift))
        assert product == pytest.approx(float(shift == 0), abs=1e-14)
    for degree in range(N):
        moment = sum((-1) ** i * value * (i / (2 * N)) ** degree for i, value in enumerate(low))
        assert moment == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("b", [1, 2, 3, 8])
@pytest.mark.parametrize("sizes", [(24, 48), (48, 24), (24, 24)], ids=str)
def test_c3a(sizes: tuple[int, int], b: int) -> None:
    d_in, d_out = sizes
    _, layer, x = attached(ll.C3AConfig(block_size=b), d_in, d_out)
    kernels = layer.lora_kernels.detach().clone().requires_grad_()
    turn = torch.tensor([[(t - k) % b for t in range(b)] for k in range(b)])
    blocks = [torch.cat([w[turn] for w in row], dim=1) for row in kernels]
    expected = F.linear(x, layer.weight + torch.cat(blocks) / d_in, layer.bias)
    assert_same(layer, x, expected, {"lora_kernels": kernels})


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "FourierFT": ("fourierft", "lora_spectrum", {"n_frequency": 50}),
    "WaveFT": ("waveft", "lora_spectrum", {"n_frequency": 50}),
    **{
        f"WaveFT {name}": ("waveft", "lora_spectrum", {"n_frequency": 50, "wavelet_family": name})
        for name in DAUBECHIES
    },
    "C3A": ("c3a", "lora_kernels", {"block_size": 3}),
}


@pytest.mark.parametrize("sizes", [(24, 15), (15, 24), (9, 9)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_parity_with_peft(name: str, sizes: tuple[int, int]) -> None:
    peft = pytest.importorskip("peft")
    variant, tensor, fields = CASES[name]
    _, layer, x = attached(ll.LoraLiteConfig(variant=variant, **fields), *sizes, dtype=torch.float32)
    twin = nn.Sequential(nn.Linear(*sizes))
    twin[0].load_state_dict({key: value for key, value in layer.state_dict().items() if key in ("weight", "bias")})
    theirs = peft.get_peft_model(twin, getattr(peft, f"{name.split()[0]}Config")(**fields, target_modules=["0"]))
    inner = theirs.base_model.model[0]
    (values,) = [value for key, value in inner.named_parameters() if key.endswith(".default")]
    values.data.copy_(getattr(layer, tensor).data)
    expected = theirs(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    (ours,) = torch.autograd.grad(layer(x).square().mean(), getattr(layer, tensor))
    (others,) = torch.autograd.grad(expected.square().mean(), values)
    torch.testing.assert_close(ours, others, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["FourierFT", "WaveFT"])
def test_the_seed_says_which_places(name: str) -> None:
    """Other ones for another seed, and peft's for each."""
    peft = pytest.importorskip("peft")
    found = []
    for seed in (777, 5):
        fields = {"n_frequency": 50, "random_loc_seed": seed}
        model, _, _ = attached(ll.LoraLiteConfig(variant=name.lower(), **fields), 24, 15)
        theirs = peft.get_peft_model(
            nn.Sequential(nn.Linear(24, 15)), getattr(peft, f"{name}Config")(**fields, target_modules=["0"])
        )
        inner = theirs.base_model.model[0]
        (places,) = (inner.indices if name == "FourierFT" else inner.waveft_indices).values()
        found.append(entries(model, 24))
        assert found[-1] == [tuple(place) for place in places.T.tolist()]
    assert found[0] != found[1]


@pytest.mark.parametrize("name", ["FourierFT", "WaveFT"])
def test_a_scale_of_zero_would_train_nothing(name: str) -> None:
    with pytest.raises(ll.ConfigError, match=rf"{name}Config\(scaling=0\): .* a number other than 0"):
        ll.LoraLiteConfig(variant=name.lower(), scaling=0)


@pytest.mark.parametrize("name", ["FourierFT", "WaveFT"])
def test_seeds_that_torch_takes(name: str) -> None:
    for seed in (-(2**63), 2**64 - 1):
        attached(ll.LoraLiteConfig(variant=name.lower(), n_frequency=5, random_loc_seed=seed), 8, 6)
    with pytest.raises(ll.ConfigError, match=rf"{name}Config\(random_loc_seed={2**64}\): a seed has at most 64 bits"):
        ll.LoraLiteConfig(variant=name.lower(), random_loc_seed=2**64)


def test_layers_of_a_size_share_their_places() -> None:
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 24), nn.Linear(24, 24))
    adapter = ll.attach(model, ll.FourierFTConfig(n_frequency=30))
    assert [name for name, _ in adapter.named_tensors() if "places" in name] == [
        "lora_places_of_384_30",
        "lora_places_of_576_30",
    ]
    assert sum(p.numel() for p in adapter.parameters()) == 90


def test_refusals() -> None:
    model = nn.Sequential(nn.Linear(24, 16))
    with pytest.raises(ll.TargetError, match=r"FourierFTConfig\(n_frequency=1000\) on a layer 24 → 16: at most 384"):
        ll.attach(model, ll.FourierFTConfig())
    with pytest.raises(ll.TargetError, match=r"WaveFTConfig\(n_frequency=2592\) on a layer 24 → 16: at most 384"):
        ll.attach(model, ll.WaveFTConfig())
    with pytest.raises(ll.TargetError, match=r"block_size=256\) on a layer 24 → 16: \[1, 2, 4, 8\] divide both"):
        ll.attach(model, ll.C3AConfig())
    with pytest.raises(ll.ConfigError, match=r"wavelet_family='sym2'\): the wavelets here are db1, db2, .*, db8"):
        ll.WaveFTConfig(wavelet_family="sym2")
    for made in (ll.FourierFTConfig, ll.WaveFTConfig):
        with pytest.raises(ll.ConfigError, match=r"n_frequency=0\): a whole number of at least 1"):
            made(n_frequency=0)
        with pytest.raises(ll.ConfigError, match=r"scaling='x'\): scaling is a finite number"):
            made(scaling="x")
        with pytest.raises(ll.ConfigError, match=r"random_loc_seed=None\): random_loc_seed is a whole number"):
            made(random_loc_seed=None)
    with pytest.raises(ll.ConfigError, match=r"C3AConfig\(block_size=0\): a whole number of at least 1"):
        ll.C3AConfig(block_size=0)
