"""BOFT against the product of permuted block rotations, and against the peft package."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll
from tests.oracles import D_IN, D_OUT, assert_same, filled, peft_twin


def cayley(entries: Tensor, b: int) -> Tensor:
    rows, columns = torch.triu_indices(b, b, 1)
    Q = torch.zeros(b, b, dtype=entries.dtype).index_put((rows, columns), entries)
    Q, identity = Q - Q.T, torch.eye(b, dtype=entries.dtype)
    return torch.linalg.inv(identity - Q) @ (identity + Q)


def members(d: int, b: int, i: int) -> list[list[int]]:
    """The inputs of each block of factor i: a half-block and the one that is 2ⁱ halves behind it."""
    half, taken, found = b // 2, set[int](), []
    if i == 0:
        return [list(range(start, start + b)) for start in range(0, d, b)]
    for first in range(d // half):
        if first not in taken:
            taken |= {first, first + 2**i}
            found.append([h * half + k for h in (first, first + 2**i) for k in range(half)])
    return found


def butterfly(q: Tensor, d: int, b: int, factors: int) -> Tensor:
    R = torch.eye(d, dtype=q.dtype)
    blocks = iter(q)
    for i in range(factors):
        M = torch.eye(d, dtype=q.dtype)
        for inputs in members(d, b, i):
            places = torch.tensor(inputs)
            M = M.index_put((places[:, None], places[None]), cayley(next(blocks), b))
        R = R @ M
    return R


def own(layer: Any) -> dict[str, Tensor]:
    return {name: getattr(layer, name).detach().clone().requires_grad_() for name in ("lora_q", "lora_s")}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("b", "factors"), [(3, 1), (24, 1), (12, 2), (4, 2), (2, 3), (6, 3)])
def test_formula(b: int, factors: int, bias: bool) -> None:
    layer, x = filled(ll.BOFTConfig(block_size=b, factors=factors), size=0.5, bias=bias)
    names = own(layer)
    weight = (1 + names["lora_s"])[:, None] * layer.weight @ butterfly(names["lora_q"], D_IN, b, factors)
    assert_same(layer, x, F.linear(x, weight, layer.bias), names, 1e-11)


def test_a_number_of_blocks() -> None:
    by_size, x = filled(ll.BOFTConfig(block_size=6, factors=2))
    by_number, _ = filled(ll.BOFTConfig(block_num=4, factors=2))
    assert torch.equal(by_size(x), by_number(x))


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_how_far_inputs_reach(factors: int) -> None:
    """b 2ᵐ⁻¹ of them, and no further; and a rotation stays a rotation."""
    cfg = ll.BOFTConfig(block_size=2, factors=factors)
    layer, _ = filled(cfg)
    R = ll.get_variant("boft").forward_input(
        {"x": torch.eye(D_IN).double(), "params": {"lora_q": layer.lora_q.detach()}, "cfg": cfg}
    )
    reach = 2 * 2 ** (factors - 1)
    stretches = torch.block_diag(*[torch.ones(reach, reach)] * (D_IN // reach)).bool()
    assert torch.equal(R != 0, stretches)
    torch.testing.assert_close(R @ R.T, torch.eye(D_IN).double(), rtol=0, atol=1e-12)


def test_counts_and_liveness() -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    adapter = ll.attach(model, ll.BOFTConfig(block_size=4, factors=2))
    assert sum(p.numel() for p in adapter.parameters()) == 2 * D_IN * 3 // 2 + D_OUT
    model(torch.randn(3, D_IN)).square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in adapter.parameters())


def test_sizes_that_do_not_fit() -> None:
    for fields, message in (
        (
            {"block_size": 8},
            r"BOFTConfig(block_size=8, factors=3) on a layer with d_in=24: block sizes that fit: [2, 6]",
        ),
        ({"block_num": 5}, r"BOFTConfig(block_num=5, factors=3) on a layer with d_in=24: block sizes that fit: [2, 6]"),
    ):
        with pytest.raises(ll.TargetError) as caught:
            ll.attach(nn.Sequential(nn.Linear(D_IN, D_OUT)), ll.BOFTConfig(factors=3, **fields))
        assert message in str(caught.value)
    with pytest.raises(ll.ConfigError, match=r"BOFTConfig\(block_size=3\): 2 factors need halves of blocks"):
        ll.BOFTConfig(block_size=3)
    with pytest.raises(ll.ConfigError, match=r"BOFTConfig\(factors=0\): give a whole number of at least 1"):
        ll.BOFTConfig(factors=0)


def test_more_factors_than_any_width_has() -> None:
    """Of a file, say: answered at once, without a number of as many bits."""
    with pytest.raises(ll.TargetError, match=r"factors=1000000000000\) on a layer with d_in=24: .* that fit: \[\]"):
        ll.attach(nn.Sequential(nn.Linear(D_IN, D_OUT)), ll.BOFTConfig(factors=10**12))


class Extension:
    """What the peft package's CUDA extension computes: block-diagonal matrices, and the way back."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*one) for one in blocks])]

    @staticmethod
    def backward(gradient: Tensor, blocks: Tensor) -> list[Tensor]:
        b = blocks.shape[-1]
        starts = range(0, gradient.shape[-1], b)
        return [torch.stack([gradient[:, s : s + b, s : s + b] for s in starts], dim=1)]


@pytest.mark.parametrize("by_number", [True, False])
@pytest.mark.parametrize("factors", [1, 2, 3])
def test_parity_with_peft(factors: int, by_number: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    from peft.tuners.boft import layer as boft

    monkeypatch.setattr(boft, "_FBD_CUDA", Extension)
    blocks: dict[str, int] = {"block_num": 4} if by_number else {"block_size": 6}
    layer, x = filled(ll.BOFTConfig(factors=factors, **blocks), torch.float32, size=0.3)
    theirs = {"boft_block_size": 0, "boft_block_num": 0} | {f"boft_{name}": value for name, value in blocks.items()}
    config = peft.BOFTConfig(**theirs, boft_n_butterfly_factor=factors, target_modules=["0"])
    model, inner = peft_twin(layer, config)
    R, s = inner.boft_R["default"], inner.boft_s["default"]
    fields, tensors = ll.get_variant("boft").to_peft(
        {
            "params": {name: p.detach() for name, p in own(layer).items()},
            "cfg": ll.BOFTConfig(factors=factors, **blocks),
            "layer": layer,
        }
    )
    assert {name: fields[name] for name in theirs} == theirs
    R.data, s.data = tensors["boft_R"].clone(), tensors["boft_s"].clone()
    ours, expected = layer(x), model(x)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    a = torch.autograd.grad(ours.square().mean(), (layer.lora_q, layer.lora_s))
    b = torch.autograd.grad(expected.square().mean(), (R, s))
    rows, columns = torch.triu_indices(6, 6, 1)
    upper = (b[0] - b[0].mT)[..., rows, columns].flatten(0, 1)
    torch.testing.assert_close(a[0], upper, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a[1], b[1].flatten(), rtol=1e-4, atol=1e-5)
    back = ll.get_variant("boft").from_peft({"config": {**fields}, "tensors": tensors, "layer": layer})
    assert back is not None
    torch.testing.assert_close(back[1]["lora_q"], layer.lora_q.detach(), rtol=1e-6, atol=1e-7)
    assert back[0] == {**blocks, "factors": factors}


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's own
def test_folders_of_several_factors_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    from peft.tuners.boft import layer as boft

    monkeypatch.setattr(boft, "_FBD_CUDA", Extension)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(D_IN, D_OUT), nn.Tanh(), nn.Linear(D_OUT, D_IN))
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=["0", "2"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    x = torch.randn(5, D_IN)
    expected = theirs(x)
    ours = copy.deepcopy(base)
    assert ll.import_peft(ours, tmp_path / "theirs").cfg.to_dict()["factors"] == 2
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(base(x), expected, atol=1e-2)
    ll.export_peft(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    torch.testing.assert_close(back(x), expected, rtol=1e-4, atol=1e-5)
