"""KaSA against its formula and the form that writes the weight, and against the peft package, folders both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll
from tests.oracles import assert_same

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's own
X = torch.randn(16, 12, generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10))


def moved(adapter: ll.Adapter, size: float = 0.5) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=size)


def truncated(W: Tensor, r: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(W.detach(), full_matrices=False)
    return (U[:, :-r] * S[:-r]) @ Vh[:-r]


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize(("d_in", "d_out"), [(12, 8), (8, 12), (9, 9)])
def test_the_form_that_writes_the_weight(d_in: int, d_out: int, alpha: float | None) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(d_in, d_out).double()
    adapter = ll.attach(nn.Sequential(layer), ll.KaSAConfig(r=3, alpha=alpha))
    x = torch.randn(5, d_in, dtype=torch.float64, requires_grad=True)
    W = truncated(layer.weight, 3)
    torch.testing.assert_close(layer(x), F.linear(x, W, layer.bias), rtol=0, atol=1e-10)
    moved(adapter, 1.0)
    A, B, l = (getattr(layer, f"lora_{key}").detach().clone().requires_grad_() for key in "ABl")
    expected = F.linear(x, W + (alpha or 3.0) / 3 * B @ torch.diag(l) @ A, layer.bias)
    assert_same(layer, x, expected, {"lora_A": A, "lora_B": B, "lora_l": l}, 1e-10)
    assert sum(p.numel() for p in adapter.parameters()) == 3 * (d_in + d_out + 1)


def test_step_0_is_the_base_but_for_its_smallest_triplets() -> None:
    layer = nn.Linear(12, 8).double()
    sigma = torch.linalg.svdvals(layer.weight.detach())
    base = layer(X.double()).detach()
    ll.attach(nn.Sequential(layer), ll.KaSAConfig(r=3))
    moved_by = (layer(X.double()) - base).detach().norm(dim=1) / X.double().norm(dim=1)
    assert 0 < float(moved_by.max()) <= float(sigma[-3])
    layer = nn.Linear(12, 8).double()
    layer.weight.data = truncated(layer.weight, 3)
    base = layer(X.double()).detach()
    ll.attach(nn.Sequential(layer), ll.KaSAConfig(r=3))
    torch.testing.assert_close(layer(X.double()).detach(), base, rtol=0, atol=1e-12)


def test_dropout_leaves_what_is_out_alone() -> None:
    layer = nn.Linear(12, 8)
    ll.attach(nn.Sequential(layer), ll.KaSAConfig(r=3, dropout=0.5))
    assert torch.equal(layer.train()(X), layer.eval()(X))
    layer.lora_B.data.normal_()
    assert not torch.equal(layer.train()(X), layer.eval()(X))


def test_refusals() -> None:
    with pytest.raises(ll.TargetError, match=r"KaSAConfig\(r=8\) on a layer 12 → 8: r is at most 7, or all is out"):
        ll.attach(nn.Sequential(nn.Linear(12, 8)), ll.KaSAConfig(r=8))
    with pytest.raises(ll.ConfigError, match=r"KaSAConfig\(beta=-1.0, gamma=0.001\): weights are numbers from 0"):
        ll.KaSAConfig(beta=-1.0)


def theirs_of() -> Any:
    return peft.get_peft_model(
        net(),
        peft.LoraConfig(
            r=3,
            lora_alpha=6,
            lora_dropout=0.1,
            target_modules=["0", "2"],
            kasa_config=peft.tuners.lora.KasaConfig(beta=0.02, gamma=0.3),
        ),
    )


def test_parity_with_peft() -> None:
    """Outputs, both regularisers, and the gradients of their sum."""
    model, theirs = net(), theirs_of().eval()
    adapter = ll.attach(model.eval(), ll.KaSAConfig(r=3, alpha=6.0, dropout=0.1, beta=0.02, gamma=0.3))
    moved(adapter)
    pairs = []
    for name, target in adapter.layers().items():
        inner, p = theirs.base_model.model.get_submodule(name), target.params
        pairs += [(p["lora_A"], inner.lora_A["default"].weight), (p["lora_B"], inner.lora_B["default"].weight)]
        pairs.append((p["lora_l"], inner.lora_diag["default"]))
    for ours, their in pairs:
        their.data.copy_(ours.detach())
    torch.testing.assert_close(model(X), theirs(X), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ll.penalty(model), theirs.base_model._get_kasa_loss(), rtol=1e-5, atol=1e-6)
    losses = [model(X).square().mean() + ll.penalty(model)]
    losses.append(theirs(X).square().mean() + theirs.base_model._get_kasa_loss())
    found = [torch.autograd.grad(loss, [p[i] for p in pairs]) for i, loss in enumerate(losses)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_folders_both_ways(tmp_path: Path) -> None:
    theirs = theirs_of()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    expected = theirs.eval()(X).detach()
    theirs.save_pretrained(tmp_path / "theirs")
    model = net()
    adapter = ll.import_peft(model, tmp_path / "theirs")
    assert adapter.record.variant.name == "kasa"
    cfg: Any = adapter.cfg
    assert (cfg.r, cfg.alpha, cfg.dropout, cfg.beta, cfg.gamma) == (3, 6, 0.1, 0.02, 0.3)
    torch.testing.assert_close(model.eval()(X).detach(), expected, rtol=1e-4, atol=1e-4)
    ll.export_peft(model, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(net(), tmp_path / "ours").eval()
    torch.testing.assert_close(back(X).detach(), expected, rtol=1e-4, atol=1e-4)


def test_peft_has_it_for_linear_layers_alone(tmp_path: Path) -> None:
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(Conv1D(8, 12))
    ll.attach(model, ll.KaSAConfig(r=3))
    with pytest.raises(ll.MergeError, match="PEFT's KaSA takes nn.Linear layers, not a Conv1D"):
        ll.export_peft(model, tmp_path / "none")
