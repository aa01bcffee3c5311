"""EVA: the subspace, padding, shared inputs, rank redistribution, and too little data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll

D = 24


class Model(nn.Module):
    """Two layers that receive the same tensor, one that receives another; padding counts nowhere but in the input."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.o_proj = nn.Linear(D, 16), nn.Linear(D, 12), nn.Linear(16, 20)

    def hidden(self, x: Tensor) -> Tensor:
        return torch.sin(3 * self.q_proj(x))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.o_proj(self.hidden(x)) + self.k_proj(x).sum(-1, keepdim=True)


def model() -> Model:
    torch.manual_seed(0)
    return Model()


def data(batches: int = 4, size: int = 8, length: int = 6) -> list[Tensor]:
    """Inputs with a clear principal subspace and a large mean."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(D, D, generator=generator) * (1.5 ** -torch.arange(D))
    return [torch.randn(size, length, D, generator=generator) @ mixing.T + 3 for _ in range(batches)]


def truth(X: Tensor, r: int, center: bool) -> Tensor:
    X = X.reshape(-1, X.shape[-1]).double()
    X = X - X.mean(0) if center else X
    return torch.linalg.svd(X, full_matrices=False).Vh[:r]


def angle(first: Tensor, second: Tensor) -> float:
    outside = second - second @ first.T @ first
    return float(torch.linalg.matrix_norm(outside, 2).clamp(max=1).asin())


@pytest.mark.parametrize("center", [True, False])
def test_directions(center: bool) -> None:
    m, batches = model(), data()
    adapter = ll.attach(m, ll.EVAConfig(r=4, center=center), calibration_data=batches)
    X = torch.cat(batches)
    A = m.q_proj.lora_A.detach().double()
    assert angle(truth(X, 4, center), A) < 1e-4
    torch.testing.assert_close(A @ A.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-5)
    assert torch.equal(m.q_proj.lora_A, m.k_proj.lora_A), "one statistic for layers that receive the same tensor"
    hidden = m.hidden(X).detach()
    assert angle(truth(hidden, 4, center), m.o_proj.lora_A.detach().double()) < 1e-2
    assert all(float(t.detach().abs().max()) == 0 for name, t in adapter.named_tensors() if name.endswith("lora_B"))


def test_centring_matters() -> None:
    X = torch.cat(data())
    assert angle(truth(X, 4, True), truth(X, 4, False)) > 0.5


def test_padding_changes_nothing() -> None:
    plain, padded = model(), model()
    batches = data()
    ll.attach(plain, ll.EVAConfig(r=4), calibration_data=batches)
    mask = torch.cat([torch.ones(8, 6), torch.zeros(8, 3)], dim=1).long()
    noisy = [{"x": torch.cat([x, 100 * torch.randn(8, 3, D)], dim=1), "attention_mask": mask} for x in batches]
    ll.attach(padded, ll.EVAConfig(r=4), calibration_data=noisy)
    assert angle(plain.q_proj.lora_A.detach(), padded.q_proj.lora_A.detach()) < 1e-3


def test_batches_smaller_than_the_rank_are_ordinary() -> None:
    whole, pieces = model(), model()
    batches = data()
    ll.attach(whole, ll.EVAConfig(r=6), calibration_data=batches)
    ll.attach(
        pieces,
        ll.EVAConfig(r=6),
        calibration_data=[x[i : i + 1, :2] for x in batches for i in range(8)] + [x[:, 2:] for x in batches],
    )
    assert angle(whole.q_proj.lora_A.detach(), pieces.q_proj.lora_A.detach()) < 1e-3


def test_too_little_data_is_said() -> None:
    m = model()
    keys = list(m.state_dict())
    with pytest.raises(
        ll.CalibrationError, match="q_proj saw 6 tokens of calibration data, too few for 8 directions; give more"
    ):
        ll.attach(m, ll.EVAConfig(r=8), calibration_data=[torch.randn(1, 6, D)])
    assert list(m.state_dict()) == keys
    with pytest.raises(ll.CalibrationError, match="variant 'eva' needs calibration data"):
        ll.attach(m, ll.EVAConfig(r=8))


@pytest.mark.parametrize("alpha", [None, 12.0])
def test_ranks_are_redistributed(alpha: float | None, tmp_path: Any) -> None:
    m, batches = model(), data()
    cfg = ll.EVAConfig(r=5, alpha=alpha, rho=2.0)
    adapter = ll.attach(m, cfg, calibration_data=batches)
    ranks = {name: target.cfg.r for name, target in adapter.layers().items()}
    assert sum(ranks.values()) == 5 * 3
    assert max(ranks.values()) <= 10
    assert len(set(ranks.values())) > 1
    assert {target.cfg.scale for target in adapter.layers().values()} == {cfg.scale}
    # The best shares of explained variance have won.
    shares = {}
    for name, X in (
        ("q_proj", torch.cat(batches)),
        ("k_proj", torch.cat(batches)),
        ("o_proj", m.hidden(torch.cat(batches)).detach()),
    ):
        X = X.reshape(-1, X.shape[-1]).double()
        S2 = torch.linalg.svdvals(X - X.mean(0)).square()
        shares[name] = (S2 / S2.sum())[:10].tolist()
    best = sorted(((s, name) for name, values in shares.items() for s in values), reverse=True)[:15]
    assert ranks == {name: sum(n == name for _, n in best) for name in ranks}
    for name, X in (("q_proj", torch.cat(batches)),):
        assert angle(truth(X, ranks[name], True), getattr(m, name).lora_A.detach().double()) < 1e-3
    expected = m(batches[0])
    adapter.save(tmp_path / "eva.safetensors")
    fresh = model()
    ll.load(fresh, tmp_path / "eva.safetensors")
    assert torch.equal(fresh(batches[0]), expected)


def test_a_layer_may_lose_its_adapter() -> None:
    m = nn.Sequential(nn.Linear(D, D), nn.Linear(D, 4))
    m[0].weight.data.copy_(torch.eye(D))
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(400, D, generator=generator)
    m[0].forward = lambda x: x[:, :1] * torch.linspace(1, 2, D) + 1e-3 * x  # type: ignore[method-assign]
    adapter = ll.attach(m, ll.EVAConfig(r=1, rho=2.0), calibration_data=[flat])
    assert adapter.targets in (("1",), ("0", "1"))
    assert sum(target.cfg.r for target in adapter.layers().values()) == 2


def test_rho_below_one() -> None:
    with pytest.raises(ll.ConfigError, match=r"EVAConfig\(rho=0.5\)"):
        ll.EVAConfig(rho=0.5)


def test_a_rank_that_the_inputs_do_not_have() -> None:
    with pytest.raises(ll.TargetError, match=r"EVAConfig\(r=25\) on a layer 24 → 16: r is at most 24"):
        ll.attach(model(), ll.EVAConfig(r=25, target_names=("q_proj",)), calibration_data=data())
    m = model()
    ll.attach(m, ll.EVAConfig(r=24, rho=3.0, target_names=("q_proj",)), calibration_data=data())
    A = m.q_proj.lora_A.detach()
    torch.testing.assert_close(A @ A.T, torch.eye(24), rtol=0, atol=1e-4)


def test_inputs_that_do_not_vary_have_no_directions() -> None:
    with pytest.raises(ll.CalibrationError, match="q_proj: all inputs in the calibration data are the same"):
        ll.attach(model(), ll.EVAConfig(r=2), calibration_data=[torch.full((2, 6, D), 0.7)])
