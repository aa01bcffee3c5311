"""PiSSA against the published form that writes the weight, and against the peft package."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll


def attached(
    cfg: ll.AdapterConfig, dtype: torch.dtype = torch.float64, d_in: int = 12, d_out: int = 7
) -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(d_in, d_out)).to(dtype)
    ll.attach(model, cfg)
    return model[0], torch.randn(5, d_in, dtype=dtype, requires_grad=True)


def published(layer: nn.Linear, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """W_res, A and B of the form that writes the weight, from its own SVD."""
    weight, r = layer.weight.detach(), len(layer.lora_A0)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    A, B = (S[:r] / scale).sqrt()[:, None] * Vh[:r], U[:, :r] * (S[:r] / scale).sqrt()
    return weight - scale * B @ A, A, B


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize(("d_in", "d_out"), [(12, 7), (7, 12), (9, 9)])
def test_formula(alpha: float | None, d_in: int, d_out: int) -> None:
    layer, x = attached(ll.PiSSAConfig(r=3, alpha=alpha), d_in=d_in, d_out=d_out)
    scale = (alpha or 3) / 3
    W_res, A_svd, B_svd = published(layer, scale)
    torch.testing.assert_close(layer.lora_B0 @ layer.lora_A0, B_svd @ A_svd, rtol=1e-9, atol=1e-10)
    for parameter in (layer.lora_dA, layer.lora_dB):
        nn.init.normal_(parameter)
    A = (layer.lora_A0 + layer.lora_dA).detach().requires_grad_()
    B = (layer.lora_B0 + layer.lora_dB).detach().requires_grad_()
    residual = (layer.weight - scale * layer.lora_B0 @ layer.lora_A0).detach()
    torch.testing.assert_close(residual, W_res, rtol=1e-9, atol=1e-10)
    expected = F.linear(x, residual + scale * B @ A, layer.bias)
    got = layer(x)
    assert float((got - expected).detach().abs().max()) < 1e-12
    direction = torch.randn_like(got)
    ours = torch.autograd.grad(got, (x, layer.lora_dA, layer.lora_dB), direction)
    theirs = torch.autograd.grad(expected, (x, A, B), direction)
    assert all(float((a - b).detach().abs().max()) < 1e-12 for a, b in zip(ours, theirs, strict=True))


def test_adam_walks_the_published_path() -> None:
    layer, _ = attached(ll.PiSSAConfig(r=3))
    W_res = (layer.weight - layer.lora_B0 @ layer.lora_A0).detach()
    A, B = layer.lora_A0.detach().clone().requires_grad_(), layer.lora_B0.detach().clone().requires_grad_()
    ours = torch.optim.AdamW([layer.lora_dA, layer.lora_dB], lr=1e-2, weight_decay=0.0)
    theirs = torch.optim.AdamW([A, B], lr=1e-2, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        x = torch.randn(8, 12, generator=generator, dtype=torch.float64)
        layer(x).square().mean().backward()
        F.linear(x, W_res + B @ A, layer.bias).square().mean().backward()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    assert float((layer.lora_A0 + layer.lora_dA - A).detach().abs().max()) < 1e-9
    assert float((layer.lora_B0 + layer.lora_dB - B).detach().abs().max()) < 1e-9


def test_start() -> None:
    layer, x = attached(ll.PiSSAConfig(r=3))
    assert float(layer.lora_dA.detach().abs().max()) == float(layer.lora_dB.detach().abs().max()) == 0
    assert not layer.lora_A0.requires_grad
    assert not layer.lora_B0.requires_grad
    layer(x).square().sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in (layer.lora_dA, layer.lora_dB)), "no parameter is dead at step 0"
    assert sum(p.numel() for p in (layer.lora_dA, layer.lora_dB)) == 3 * (12 + 7)


def test_more_rank_than_singular_values() -> None:
    model = nn.Sequential(nn.Linear(12, 7))
    with pytest.raises(
        ll.TargetError, match="0 has 7 singular values and cannot have r=8; lower r or use rank_pattern"
    ):
        ll.attach(model, ll.PiSSAConfig(r=8))
    assert list(model.state_dict()) == ["0.weight", "0.bias"]


def test_parity_with_peft() -> None:
    peft = pytest.importorskip("peft")
    layer, x = attached(ll.PiSSAConfig(r=3, alpha=6), torch.float32)
    twin = nn.Sequential(nn.Linear(12, 7))
    twin[0].load_state_dict({"weight": layer.weight, "bias": layer.bias})
    theirs = peft.get_peft_model(
        twin, peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights="pissa", target_modules=["0"])
    )
    inner = theirs.base_model.model[0]
    A, B = inner.lora_A["default"].weight, inner.lora_B["default"].weight
    torch.testing.assert_close(layer.lora_B0 @ layer.lora_A0, B @ A, rtol=1e-4, atol=1e-5)
    # From the same tensors: our frozen start becomes theirs, whatever signs their SVD chose.
    dA, dB = 0.1 * torch.randn(3, 12), 0.1 * torch.randn(7, 3)
    layer.lora_dA.data, layer.lora_dB.data = dA, dB
    A.data, B.data = layer.lora_A0 + dA, layer.lora_B0 + dB
    ours, expected = layer(x), theirs(x)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    ours.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(layer.lora_dA.grad, A.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.lora_dB.grad, B.grad, rtol=1e-4, atol=1e-4)
