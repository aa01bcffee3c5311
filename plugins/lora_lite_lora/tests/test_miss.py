"""MiSS in its three modes against dense matrices, and against the peft package."""

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
MODES: list[dict[str, Any]] = [
    {"r": 4},
    {"r": 5},
    {"r": D_IN},
    {"r": 4, "mode": "mini", "mini_r": 8},
    {"r": 7, "mode": "mini"},
    {"r": 4, "mode": "bat"},
    {"r": 8, "mode": "bat"},
]


def change(cfg: Any, D: Tensor, W: Tensor) -> Tensor:
    """ΔW entry by entry."""
    made = torch.empty_like(W)
    d_out, d_in = W.shape
    for j in range(d_out):
        for i in range(d_in):
            shard, c = divmod(i, cfg.r)
            if cfg.mode == "bat":
                D_j = D[j // cfg.r * cfg.r : (j // cfg.r + 1) * cfg.r]
                made[j, i] = W[j, shard * cfg.r : (shard + 1) * cfg.r] @ D_j[:, c] + D_j[j % cfg.r, c]
            else:
                made[j, i] = D[j % len(D), c]
    return made


@pytest.mark.parametrize("fields", MODES, ids=str)
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_formula(fields: dict[str, Any], alpha: float | None) -> None:
    cfg: Any = ll.LoraLiteConfig(variant="miss", alpha=alpha, **fields)
    layer, x = filled(cfg)
    D = layer.lora_D.detach().clone().requires_grad_()
    scale = 1 if alpha is None else alpha / cfg.r
    expected = F.linear(x, layer.weight + change(cfg, scale * D, layer.weight.detach()), layer.bias)
    assert_same(layer, x, expected, {"lora_D": D}, 1e-10)


@pytest.mark.parametrize("fields", MODES, ids=str)
def test_it_is_that_of_peft(fields: dict[str, Any]) -> None:
    import peft

    mode, mini_r = fields.get("mode", True), fields.get("mini_r", 1)
    layer, x = filled(ll.LoraLiteConfig(variant="miss", **fields), torch.float32)
    cfg = peft.MissConfig(r=fields["r"], init_weights=mode, mini_r=mini_r, target_modules=["0"])
    theirs, inner = peft_twin(layer, cfg)
    block, D = inner.miss_block["default"], layer.lora_D
    block.data = (D.data.view(block.shape) if mode == "bat" else D.data.T).clone()
    got, expected = layer(x), theirs(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    (ours,) = torch.autograd.grad(got.square().mean(), D)
    (gradient,) = torch.autograd.grad(expected.square().mean(), block)
    gradient = gradient.view(D.shape) if mode == "bat" else gradient.T
    torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-4)


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    del model.config  # which is none of transformers'
    return model


@pytest.mark.parametrize("fields", [{"r": 5, "miss_dropout": 0.1}, {"r": 4, "init_weights": "bat"}, {"r": 4, "init_weights": "mini", "mini_r": 8}], ids=str)  # fmt: skip
def test_folders(fields: dict[str, Any], tmp_path: Path) -> None:
    import peft

    theirs = peft.get_peft_model(net(), peft.MissConfig(target_modules=["q_proj", "up_proj", "down_proj"], **fields))
    for name, parameter in theirs.eval().named_parameters():
        if "miss" in name:
            nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs(token_ids()).detach()
    ours = net().eval()
    ll.import_peft(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(token_ids()).detach(), expected, rtol=1e-4, atol=1e-5)
    ll.export_peft(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(net(), tmp_path / "ours").eval()
    torch.testing.assert_close(back(token_ids()).detach(), expected, rtol=1e-4, atol=1e-5)


def test_a_scale_is_written_into_the_block(tmp_path: Path) -> None:
    import peft

    model = net()
    for parameter in ll.attach(model, ll.LoraLiteConfig(variant="miss", r=4, alpha=2.0)).parameters():
        nn.init.normal_(parameter, std=0.3)
    ll.export_peft(model, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(net(), tmp_path / "ours")
    torch.testing.assert_close(back(token_ids()), model(token_ids()), rtol=1e-4, atol=1e-5)


def test_bat_on_four_bits() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    packed = nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4")).to("cpu")
    dense = nn.Sequential(nn.Linear(64, 64))
    dense.load_state_dict({"0.weight": ll.dense_weight(packed[0]), "0.bias": packed[0].bias})
    x = torch.randn(3, 64)
    for model in (packed, dense):
        ll.attach(model, ll.LoraLiteConfig(variant="miss", r=8, mode="bat"))
        torch.manual_seed(1)
        nn.init.normal_(model[0].lora_D, std=0.1)
    torch.testing.assert_close(packed(x), dense(x), rtol=1e-2, atol=1e-2)


def test_refusals() -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    for fields, text in (
        ({"r": 25}, r"MiSSConfig\(r=25\) on a layer 24 → 16: r is at most 24"),
        ({"mode": "mini", "mini_r": 3}, r"mini_r=3\) does not divide d_out=16; these do: \[1, 2, 4, 8, 16\]"),
        ({"mode": "bat", "r": 16}, r"mode='bat', r=16\) on a layer 24 → 16: \[1, 2, 4, 8\] divide both"),
    ):
        with pytest.raises(ll.TargetError, match=text):
            ll.attach(model, ll.LoraLiteConfig(variant="miss", **{"r": 4, **fields}))
    for fields, text in (
        ({"mode": "max"}, r"MiSSConfig\(mode='max'\): the modes are 'default', 'mini', 'bat'"),
        ({"mini_r": 0}, r"MiSSConfig\(mini_r=0\): it is a whole number of at least 1"),
        ({"mode": "bat", "dropout": 0.1}, r"bat changes the weight; set dropout to 0"),
    ):
        with pytest.raises(ll.ConfigError, match=text):
            ll.LoraLiteConfig(variant="miss", **fields)
