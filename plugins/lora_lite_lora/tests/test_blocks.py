"""LoRAs of parts of a layer, MELoRA and GraLoRA, against dense matrices and against the peft package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll
from tests.models import Net, token_ids
from tests.oracles import D_IN, D_OUT, assert_same, filled, peft_twin

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
ALL = ["q_proj", "o_proj", "up_proj", "down_proj"]


def copies(layer: Any, *names: str) -> dict[str, Tensor]:
    return {name: getattr(layer, name).detach().clone().requires_grad_() for name in names}


def melora_weight(A: Tensor, B: Tensor, n: int) -> Tensor:
    return torch.block_diag(*[b @ a for a, b in zip(A.chunk(n, 1), B.chunk(n, 0), strict=True)])


def gralora_weight(A: Tensor, B: Tensor, k: int) -> Tensor:
    """Block (j, i) of the change, from row block j of A_i and column block i of B_j."""
    rows = []
    for j in range(k):
        B_j = B.chunk(k, 0)[j]
        rows.append(torch.cat([B_j.chunk(k, 1)[i] @ A.chunk(k, 1)[i].chunk(k, 0)[j] for i in range(k)], 1))
    return torch.cat(rows, 0)


@pytest.mark.parametrize("n", [1, 2, 8])
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_melora(n: int, alpha: float | None) -> None:
    layer, x = filled(ll.LoraLiteConfig(variant="melora", r=4, n=n, alpha=alpha))
    p = copies(layer, "lora_A", "lora_B")
    change = (alpha or 4) / 4 * melora_weight(p["lora_A"], p["lora_B"], n)
    assert_same(layer, x, F.linear(x, layer.weight + change, layer.bias), p, 1e-10)
    assert torch.linalg.matrix_rank(change) == min(4 * n, D_OUT)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize(("alpha", "hybrid_r"), [(None, 0), (6.0, 0), (6.0, 3), (None, 3)])
def test_gralora(k: int, alpha: float | None, hybrid_r: int) -> None:
    layer, x = filled(ll.LoraLiteConfig(variant="gralora", r=4, k=k, alpha=alpha, hybrid_r=hybrid_r))
    p = copies(layer, "lora_A", "lora_B", *(("lora_A_hybrid", "lora_B_hybrid") if hybrid_r else ()))
    change = gralora_weight(p["lora_A"], p["lora_B"], k)
    if hybrid_r:
        change = change + p["lora_B_hybrid"] @ p["lora_A_hybrid"]
    change = change * (1 if alpha is None else alpha / (4 + hybrid_r))
    assert_same(layer, x, F.linear(x, layer.weight + change, layer.bias), p, 1e-10)
    assert torch.linalg.matrix_rank(change) == min(4 * k + hybrid_r, D_OUT)


@pytest.mark.parametrize(("name", "fields"), [("melora", {"n": 4}), ("gralora", {"k": 4})])
def test_start(name: str, fields: dict[str, int]) -> None:
    """As LoRAs of the parts, and of as many parameters as one LoRA."""
    model = nn.Sequential(nn.Linear(400, 16))
    adapter = ll.attach(model, ll.LoraLiteConfig(variant=name, r=8, **fields))
    assert 0.98 * 0.1 < float(model[0].lora_A.detach().abs().max()) <= 0.1
    assert float(model[0].lora_B.detach().abs().max()) == 0
    assert sum(p.numel() for p in adapter.parameters()) == 8 * 416


@pytest.mark.parametrize("hybrid_r", [0, 3])
def test_gralora_is_that_of_peft(hybrid_r: int) -> None:
    import peft

    layer, x = filled(ll.LoraLiteConfig(variant="gralora", r=4, k=2, alpha=6.0, hybrid_r=hybrid_r), torch.float32)
    theirs, inner = peft_twin(
        layer, peft.GraloraConfig(r=4, hybrid_r=hybrid_r, alpha=6, gralora_k=2, target_modules=["0"])
    )
    for n, A in enumerate(layer.lora_A.detach().chunk(2, 1)):
        inner.gralora_A["default"].data[n] = A.T
    for n, B in enumerate(layer.lora_B.detach().chunk(2, 0)):
        inner.gralora_B["default"].data[n] = B.T
    for side in "AB" if hybrid_r else "":
        inner_weight = getattr(inner, f"gralora_{side}_general")["default"].weight
        inner_weight.data = getattr(layer, f"lora_{side}_hybrid").data.clone()
    torch.testing.assert_close(layer(x), theirs(x), rtol=1e-5, atol=1e-5)
    layer(x).square().mean().backward()
    theirs(x).square().mean().backward()
    for name, axis in (("A", 1), ("B", 0)):
        gradient = getattr(layer, f"lora_{name}").grad
        for part, one in zip(gradient.chunk(2, axis), getattr(inner, f"gralora_{name}")["default"].grad, strict=True):
            torch.testing.assert_close(part.T, one, rtol=1e-5, atol=1e-5)
        if hybrid_r:
            gradient = getattr(inner, f"gralora_{name}_general")["default"].weight.grad
            torch.testing.assert_close(getattr(layer, f"lora_{name}_hybrid").grad, gradient, rtol=1e-5, atol=1e-5)


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    del model.config  # which is none of transformers'
    return model


@pytest.mark.parametrize("hybrid_r", [0, 3])
def test_graloras_folders(hybrid_r: int, tmp_path: Path) -> None:
    import peft

    cfg = peft.GraloraConfig(r=4, hybrid_r=hybrid_r, alpha=6, gralora_k=2, gralora_dropout=0.1, target_modules=ALL)
    theirs = peft.get_peft_model(net(), cfg).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs(token_ids()).detach()
    ours = net().eval()
    adapter = ll.import_peft(ours, tmp_path / "theirs")
    found: Any = next(iter(adapter.layers().values())).cfg
    assert (found.r, found.k, found.hybrid_r, found.alpha, found.dropout) == (4, 2, hybrid_r, 6, 0.1)
    torch.testing.assert_close(ours(token_ids()).detach(), expected, rtol=1e-4, atol=1e-5)
    ll.export_peft(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(net(), tmp_path / "ours").eval()
    torch.testing.assert_close(back(token_ids()).detach(), expected, rtol=1e-4, atol=1e-5)


def test_gralora_on_gpt2s_layers(tmp_path: Path) -> None:
    """Their weight is stored the other way round, which GraLoRA's tensors do not see."""
    import peft
    from transformers.pytorch_utils import Conv1D

    def gpt() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(Conv1D(16, 24), nn.Tanh(), Conv1D(24, 16))

    model, x = gpt(), torch.randn(3, 24)
    for parameter in ll.attach(model, ll.LoraLiteConfig(variant="gralora", r=4)).parameters():
        nn.init.normal_(parameter, std=0.3)
    ll.export_peft(model, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(gpt(), tmp_path / "ours")
    torch.testing.assert_close(back(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_scale_that_alpha_does_not_give_is_written_as_one(tmp_path: Path) -> None:
    import peft

    model = net()
    for parameter in ll.attach(model, ll.LoraLiteConfig(variant="gralora", r=4, hybrid_r=2)).parameters():
        nn.init.normal_(parameter, std=0.3)
    ll.export_peft(model, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(net(), tmp_path / "ours")
    torch.testing.assert_close(back(token_ids()), model(token_ids()), rtol=1e-4, atol=1e-5)


def test_sizes_that_do_not_fit() -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    with pytest.raises(ll.TargetError, match=r"MELoRAConfig\(n=3\) on a layer 24 → 16: \[1, 2, 4, 8\] divide both"):
        ll.attach(model, ll.LoraLiteConfig(variant="melora", n=3))
    with pytest.raises(ll.TargetError, match=r"GraLoRAConfig\(k=3\) .* 24 → 16: \[1, 2\] divide both and r=6"):
        ll.attach(model, ll.LoraLiteConfig(variant="gralora", r=6, k=3))
    with pytest.raises(ll.ConfigError, match=r"GraLoRAConfig\(r=5, k=2\): k must divide r; use r=6"):
        ll.LoraLiteConfig(variant="gralora", r=5)
    with pytest.raises(ll.ConfigError, match=r"GraLoRAConfig\(r=3, k=2\)"):
        ll.LoraLiteConfig(variant="gralora", r=4, rank_pattern={"q": 3})
    with pytest.raises(ll.ConfigError, match=r"GraLoRAConfig\(hybrid_r=-1\): it is a whole number of at least 0"):
        ll.LoraLiteConfig(variant="gralora", r=4, hybrid_r=-1)
    with pytest.raises(ll.ConfigError, match=r"MELoRAConfig\(n=0\): a number of LoRAs is a whole number"):
        ll.LoraLiteConfig(variant="melora", n=0)
