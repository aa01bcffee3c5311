"""LoRA-XS, SSVD and AntiPaSTO against the forms that write the weight."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lora_lite_svd._rotations import block_offset
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll
from tests.oracles import D_IN, D_OUT, assert_same, filled


def cayley(T: Tensor, b: int) -> Tensor:
    rows, columns = torch.triu_indices(b, b, 1)
    X = torch.zeros(b, b, dtype=T.dtype).index_put((rows, columns), T)
    X, identity = X - X.T, torch.eye(b, dtype=T.dtype)
    return torch.linalg.inv(identity - X) @ (identity + X)


def frozen(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vh as the layer has them: the largest triplets of its weight, up to signs."""
    U, S, Vh = layer.lora_U.detach(), layer.lora_S.detach(), layer.lora_Vh.detach()
    exact, r = torch.linalg.svd(layer.weight.detach(), full_matrices=False), len(S)
    torch.testing.assert_close(S, exact.S[:r], rtol=0, atol=1e-10)
    turned = (U.T @ exact.U[:, :r]).diagonal().sign()
    torch.testing.assert_close(U * turned, exact.U[:, :r], rtol=0, atol=1e-8)
    torch.testing.assert_close(Vh * turned[:, None], exact.Vh[:r], rtol=0, atol=1e-8)
    return U, S, Vh


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_lora_xs(bias: bool, alpha: float | None) -> None:
    layer, x = filled(ll.LoRAXSConfig(r=4, alpha=alpha), bias=bias)
    U, S, Vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    torch.testing.assert_close(layer.lora_B @ layer.lora_A, (U[:, :4] * S[:4]) @ Vh[:4], rtol=0, atol=1e-10)
    torch.testing.assert_close(layer.lora_B.T @ layer.lora_B, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-10)
    R = layer.lora_R.detach().clone().requires_grad_()
    weight = layer.weight + (alpha or 4) / 4 * layer.lora_B.detach() @ R @ layer.lora_A.detach()
    assert_same(layer, x, F.linear(x, weight, layer.bias), {"lora_R": R})


@pytest.mark.parametrize("r", [1, 2, 4, 8])
def test_ssvd(r: int) -> None:
    layer, x = filled(ll.SSVDConfig(r=r), size=0.5)
    U, S, Vh = frozen(layer)
    names = {"lora_dS": layer.lora_dS.detach().clone().requires_grad_()}
    R = torch.eye(1, dtype=torch.float64)
    if r > 1:
        names["lora_X"] = layer.lora_X.detach().clone().requires_grad_()
        R = cayley(names["lora_X"], r)
    weight = layer.weight - (U * S) @ Vh + (U * (S + names["lora_dS"])) @ R @ Vh
    assert_same(layer, x, F.linear(x, weight, layer.bias), names, 1e-11)


@pytest.mark.parametrize("rotate_basis", ["V", "U", "both", "none"])
@pytest.mark.parametrize(("b", "angle"), [(2, 0.5), (4, 0.5), (4, 1.3), (8, 3.0)])
def test_antipasto(rotate_basis: str, b: int, angle: float) -> None:
    layer, x = filled(ll.AntiPaSTOConfig(r=8, block_size=b, rotate_basis=rotate_basis, max_rotation_angle=angle))
    U, S, Vh = frozen(layer)
    names = {"lora_dS": layer.lora_dS.detach().clone().requires_grad_()}
    limit, rotations = 2 * math.tan(angle / 2), {}
    for side in "VU":
        rotations[side] = torch.eye(8, dtype=torch.float64)
        if hasattr(layer, f"lora_T{side}"):
            T = getattr(layer, f"lora_T{side}").detach().clone().requires_grad_()
            names[f"lora_T{side}"] = T
            rotations[side] = torch.block_diag(*(cayley(0.5 * limit * torch.tanh(t / (2 * limit)), b) for t in T))
    assert {name[-1] for name in names if name != "lora_dS"} == set(
        {"both": "VU", "none": ""}.get(rotate_basis, rotate_basis)
    )
    core = rotations["U"].T @ torch.diag(S + names["lora_dS"]) @ rotations["V"]
    weight = layer.weight - (U * S) @ Vh + U @ core @ Vh
    assert_same(layer, x, F.linear(x, weight, layer.bias), names, 1e-11)


@pytest.mark.parametrize(
    ("cfg", "count"),
    [
        (ll.LoRAXSConfig(r=4), 16),
        (ll.SSVDConfig(r=4), 4 + 6),
        (ll.AntiPaSTOConfig(r=8), 8 + 8 * 3 // 2),
        (ll.AntiPaSTOConfig(r=8, rotate_basis="both"), 8 + 8 * 3),
        (ll.AntiPaSTOConfig(r=8, rotate_basis="none"), 8),
    ],
)
def test_counts_and_liveness(cfg: ll.AdapterConfig, count: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    adapter = ll.attach(model, cfg)
    assert sum(p.numel() for p in adapter.parameters()) == count
    model(torch.randn(3, D_IN)).square().sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in adapter.parameters()), "nothing is dead at step 0"


@pytest.mark.parametrize(("b", "worst"), [(2, 0.5), (3, 0.833), (4, 1.105)])
def test_what_the_angle_bounds(b: int, worst: float) -> None:
    torch.manual_seed(0)
    cfg = ll.AntiPaSTOConfig(r=b * 2, block_size=b, max_rotation_angle=0.5)
    R = block_offset(
        1e4 * torch.randn(4000, b * (b - 1) // 2, dtype=torch.float64), cfg, torch.zeros(1, dtype=torch.float64)
    )
    R = R + torch.eye(b, dtype=torch.float64)
    angles = torch.linalg.eigvals(R).angle().abs().amax(-1)
    assert float(angles.max()) == pytest.approx(worst, abs=2e-3)
    single = R.float() - torch.eye(b)
    identity = torch.eye(b)
    assert float(((single + identity).mT @ (single + identity) - identity).abs().max()) < 1e-5


def test_small_shifts_survive_bfloat16_activations() -> None:
    """δ ⊙ h apart from S ⊙ h: adding δ to S in bfloat16 would lose it."""
    model = nn.Sequential(nn.Linear(D_IN, D_OUT)).bfloat16()
    model[0].weight.data *= 100
    ll.attach(model, ll.AntiPaSTOConfig(r=8, rotate_basis="none"))
    x = torch.randn(3, D_IN).bfloat16()
    hook = ll.get_variant("antipasto").forward
    model[0].lora_dS.data.fill_(1e-3)
    params = {name: getattr(model[0], f"lora_{name[5:]}") for name in ("lora_U", "lora_S", "lora_Vh", "lora_dS")}
    y = torch.zeros(3, D_OUT)
    change = hook(
        {"x": x, "y": y, "params": params, "cfg": ll.AntiPaSTOConfig(r=8, rotate_basis="none"), "layer": model[0]}
    )
    assert float(change.detach().abs().max()) > 0


def calibration(dims: int = D_IN) -> list[Tensor]:
    """Inputs that excite one singular direction far more than its singular value suggests."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(40, dims, generator=generator) for _ in range(4)]


@pytest.mark.parametrize("select", ["rms", "mean_abs"])
def test_selection_by_excitation(select: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    _, S, Vh = torch.linalg.svd(model[0].weight.detach(), full_matrices=False)
    data = [x + 50 * x[:, :1] * Vh[-1] for x in calibration()]
    X = torch.cat(data) @ Vh.T
    score = S * (X.square().mean(0).sqrt() if select == "rms" else X.abs().mean(0))
    expected = score.topk(4).indices.sort().values
    assert len(S) - 1 in expected.tolist()
    ll.attach(model, ll.AntiPaSTOConfig(r=4, select=select), calibration_data=data)
    torch.testing.assert_close(model[0].lora_S, S[expected], rtol=1e-4, atol=1e-5)
    products = (model[0].lora_Vh.detach() * Vh[expected]).sum(1).abs()
    torch.testing.assert_close(products, torch.ones(4), rtol=0, atol=1e-3)


@pytest.mark.parametrize("select", ["s", "rms", "mean_abs"])
def test_save_and_load_on_the_same_and_on_a_fresh_base(select: str, tmp_path: Any) -> None:
    """What was chosen by data is in the file: loading needs none, and refuses another base."""

    def base(seed: int = 0) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(D_IN, D_OUT))

    model, x = base(), torch.randn(3, D_IN)
    data = None if select == "s" else calibration()
    for parameter in ll.attach(model, ll.AntiPaSTOConfig(r=4, select=select), calibration_data=data).parameters():
        nn.init.normal_(parameter, std=0.1)
    adapted = model(x)
    ll.save(model, tmp_path / "a.safetensors")
    ll.detach(model)
    for target in (model, base()):
        ll.load(target, tmp_path / "a.safetensors")
        assert torch.equal(target(x), adapted)
    with pytest.raises(ll.BaseMismatch):
        ll.load(base(seed=1), tmp_path / "a.safetensors")


def test_selection_and_data_must_fit() -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    with pytest.raises(ll.CalibrationError, match="select='s' looks at the weight alone; leave calibration_data out"):
        ll.attach(model, ll.AntiPaSTOConfig(r=4), calibration_data=calibration())
    with pytest.raises(ll.CalibrationError, match="variant 'antipasto' needs calibration data"):
        ll.attach(model, ll.AntiPaSTOConfig(r=4, select="rms"))
    assert list(model.state_dict()) == ["0.weight", "0.bias"]


@pytest.mark.parametrize("select", ["rms", "mean_abs"])
def test_a_selection_by_nothing_is_an_error(select: str) -> None:
    with pytest.raises(ll.CalibrationError, match="0: all inputs in the calibration data are zero"):
        ll.attach(
            nn.Sequential(nn.Linear(D_IN, D_OUT)),
            ll.AntiPaSTOConfig(r=4, select=select),
            calibration_data=[torch.zeros(9, D_IN)],
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["antipasto", "kasa", "lora_xs", "olora", "pissa", "spectral", "ssvd", "svf", "svft"])
def test_a_weight_that_is_not_finite_is_named(name: str, value: float) -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    model[0].weight.data[2, 3] = value
    cfg = ll.LoraLiteConfig(variant=name, **({} if name == "svf" else {"r": 4}))
    with pytest.raises(ll.ModelStateError, match=rf"init of variant '{name}' .* 0.* does its weight hold (nan|any)"):
        ll.attach(model, cfg)
    assert list(model.state_dict()) == ["0.weight", "0.bias"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rotate_basis": "W"}, "AntiPaSTOConfig(rotate_basis='W'): give one of V, U, both, none"),
        ({"select": "max"}, "AntiPaSTOConfig(select='max'): give one of s, rms, mean_abs"),
        ({"block_size": 1}, "AntiPaSTOConfig(block_size=1): a rotation needs at least 2"),
        ({"r": 6}, "AntiPaSTOConfig(r=6) is not a multiple of block_size=4"),
        ({"r": 8, "rank_pattern": {"q": 6}}, "AntiPaSTOConfig(r=6) is not a multiple of block_size=4"),
        ({"max_rotation_angle": 0.0}, "AntiPaSTOConfig(max_rotation_angle=0.0): give an angle above 0 and below π"),
    ],
)
def test_bad_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ll.ConfigError) as caught:
        ll.AntiPaSTOConfig(**fields)
    assert str(caught.value) == message


@pytest.mark.parametrize("make", [ll.LoRAXSConfig, ll.SSVDConfig, ll.AntiPaSTOConfig])
def test_more_rank_than_singular_values(make: Any) -> None:
    with pytest.raises(ll.TargetError, match="0 has 16 singular values and cannot have r=20"):
        ll.attach(nn.Sequential(nn.Linear(D_IN, D_OUT)), make(r=20))


def test_milora_takes_the_smallest() -> None:
    layer, _ = filled(ll.PiSSAConfig(r=3, smallest=True))
    U, S, Vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    torch.testing.assert_close(layer.lora_B0 @ layer.lora_A0, (U[:, -3:] * S[-3:]) @ Vh[-3:], rtol=0, atol=1e-9)
