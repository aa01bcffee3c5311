"""The gain, ablation and mixing cores against the forms that write the weight; their bases; their strength."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_lite_antipasto._boundary import clamp_01
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll
from tests.oracles import assert_same

SIZES = [(24, 16), (16, 24), (16, 16)]  # d_in, d_out
NAMES = ["antipasto_gain", "antipasto_ablate", "antipasto_mix"]
BASES = ["svd", "corda", "asvd"]


def base(d_in: int = 24, d_out: int = 16, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(d_in, d_out)).to(dtype)


def calibration(d_in: int = 24, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Correlated inputs of unequal sizes."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(d_in, d_in, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, d_in).double()
    return [(torch.randn(50, d_in, generator=generator, dtype=torch.float64) @ mixing + 0.3).to(dtype) for _ in "abc"]


def config(name: str, basis: str = "svd", **fields: Any) -> Any:
    return ll.LoraLiteConfig(variant=name, **{"r": 8, **fields}, basis=basis)


def attached(name: str, basis: str = "svd", sizes: tuple[int, int] = (24, 16), **fields: Any) -> tuple[Any, Tensor]:
    """A layer with that adapter, not yet trained, and an input."""
    model = base(*sizes)
    data = None if basis == "svd" else calibration(sizes[0])
    ll.attach(model, config(name, basis, **fields), calibration_data=data)
    return model[0], torch.randn(5, sizes[0], dtype=torch.float64, requires_grad=True)


def core(name: str, layer: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The r × r matrix that stands where diag(S) stood, written out, and what it is made of."""
    S = layer.lora_S.detach()
    names = {key: p.detach().clone().requires_grad_() for key, p in layer.named_parameters() if p.requires_grad}
    names.pop("weight", None)
    names.pop("bias", None)
    if name == "antipasto_ablate":
        C, a = names["lora_C"], names["lora_a"].clamp(0, 1)
        columns: list[Tensor] = []
        for column in C.T:  # Gram and Schmidt
            for earlier in columns:
                column = column - (earlier @ column) * earlier
            columns.append(column / column.norm())
        kept = torch.eye(len(S), dtype=S.dtype) - sum(a[i] * torch.outer(c, c) for i, c in enumerate(columns))
        return kept @ torch.diag(S), names
    g = names["lora_g"]
    gain = torch.where(g > 0, S * (1 + g), S * g.exp())
    mixed = names["lora_B"] @ names["lora_A"] if name == "antipasto_mix" else torch.zeros(len(S), len(S)).double()
    return torch.diag(gain) + mixed, names


def moved(layer: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(generator=generator)
    if hasattr(layer, "lora_a"):
        layer.lora_a.data.uniform_(0.05, 0.95, generator=generator)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("name", NAMES)
def test_the_form_that_writes_the_weight(name: str, basis: str, sizes: tuple[int, int]) -> None:
    layer, x = attached(name, basis, sizes)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias)), "identity at step 0"
    moved(layer)
    U, S, P = layer.lora_U.detach(), layer.lora_S.detach(), layer.lora_P.detach()
    matrix, names = core(name, layer)
    weight = layer.weight.detach() - U @ torch.diag(S) @ P + U @ matrix @ P
    assert_same(layer, x, F.linear(x, weight, layer.bias), names, 1e-10)


@pytest.mark.parametrize("fields", [{"k": 1}, {"k": 3}, {"k": 8}])
@pytest.mark.parametrize("name", NAMES[1:])
def test_other_numbers_of_directions(name: str, fields: dict[str, int]) -> None:
    layer, x = attached(name, **fields)
    moved(layer)
    matrix, names = core(name, layer)
    change = layer.lora_U.detach() @ (matrix - torch.diag(layer.lora_S.detach())) @ layer.lora_P.detach()
    assert_same(layer, x, F.linear(x, layer.weight.detach() + change, layer.bias), names, 1e-10)


def test_the_gain_keeps_its_sign() -> None:
    layer, _ = attached("antipasto_gain")
    layer.lora_g.data.copy_(torch.linspace(-50, 50, 8))
    matrix, _ = core("antipasto_gain", layer)
    change = layer(torch.eye(24).double()) - layer(torch.zeros(24).double())
    kept = layer.lora_U.detach().T @ change.detach().T @ layer.lora_P.detach().T
    torch.testing.assert_close(kept, matrix.detach(), rtol=1e-9, atol=1e-9)
    assert (kept.diagonal() > -1e-9).all()


def test_the_ablation_is_a_contraction_wherever_its_numbers_are() -> None:
    layer, _ = attached("antipasto_ablate", k=5)
    moved(layer)
    layer.lora_a.data.copy_(torch.tensor([-3.0, 0.0, 0.5, 1.0, 7.0]))
    change = (layer(torch.eye(24).double()) - layer(torch.zeros(24).double())).detach().T - layer.weight.detach()
    kept = torch.eye(8).double() + layer.lora_U.detach().T @ change @ layer.lora_P.detach().T / layer.lora_S.detach()
    values = torch.linalg.eigvalsh((kept + kept.T) / 2)
    torch.testing.assert_close(kept, kept.T, rtol=0, atol=1e-10)
    torch.testing.assert_close(values, torch.tensor([0, 0, 0.5, 1, 1, 1, 1, 1]).double(), rtol=0, atol=1e-10)


def test_a_layer_that_is_ablated_wholly_is_merged() -> None:
    """What it puts out is rounding alone, in which no matrix is found."""
    model = nn.Sequential(nn.Linear(1, 6, bias=False)).double()
    ll.attach(model, config("antipasto_ablate", r=1, k=1))
    model[0].lora_a.data.fill_(1.0)
    ll.merge(model)
    assert float(model[0].weight.detach().abs().max()) < 1e-12


@pytest.mark.parametrize(
    ("value", "gradient", "expected"),
    [(0.5, 2.0, 2.0), (-0.1, 2.0, 0.0), (-0.1, -2.0, -2.0), (1.1, -2.0, 0.0), (1.1, 2.0, 2.0), (0.0, 2.0, 2.0)],
)
def test_the_clamp_is_no_one_way_door(value: float, gradient: float, expected: float) -> None:
    a = torch.tensor([value], requires_grad=True)
    clamped = clamp_01(a)
    assert clamped.item() == min(max(torch.tensor(value).item(), 0.0), 1.0)
    (clamped * gradient).sum().backward()
    assert a.grad.item() == expected


def test_a_share_beyond_the_end_comes_back() -> None:
    """Trained towards a half from both sides of the range: torch.clamp would leave both where they are."""
    a = torch.tensor([-0.4, 1.6], requires_grad=True)
    optimizer = torch.optim.SGD([a], lr=0.2)
    for _ in range(40):
        optimizer.zero_grad()
        (clamp_01(a) - 0.5).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(a.detach(), torch.tensor([0.5, 0.5]), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("basis", "power"), [("corda", None), ("corda", 0.5), ("asvd", None), ("asvd", 1.0)])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_oriented_bases(basis: str, power: float | None, sizes: tuple[int, int]) -> None:
    """Of the weight times a power of the inputs' statistic, which is taken back on the input side."""
    layer, _ = attached("antipasto_gain", basis, sizes, power=power)
    X, W = torch.cat(calibration(sizes[0])), layer.weight.detach()
    if basis == "corda":
        C = X.T @ X / len(X)
        C = C / (torch.trace(C) / len(C)) + 0.01 * torch.eye(len(C)).double()
        values, vectors = torch.linalg.eigh(C)
        T = vectors @ torch.diag(values ** (power or 1.0)) @ vectors.T
    else:
        T = torch.diag((X.abs().mean(0) / X.abs().mean() + 0.01) ** (power or 0.5))
    U, S, Vh = torch.linalg.svd(W @ T, full_matrices=False)
    torch.testing.assert_close(layer.lora_S.detach(), S[:8], rtol=1e-6, atol=1e-8)
    expected = (U[:, :8] * S[:8]) @ Vh[:8] @ torch.linalg.inv(T)
    got = (layer.lora_U * layer.lora_S).detach() @ layer.lora_P.detach()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    plain = torch.linalg.svd(W, full_matrices=False)
    assert not torch.allclose(got, (plain.U[:, :8] * plain.S[:8]) @ plain.Vh[:8], atol=1e-2), "another basis"


@pytest.mark.parametrize("basis", BASES)
def test_all_triplets_are_the_weight(basis: str) -> None:
    layer, _ = attached("antipasto_gain", basis, r=16)
    whole = (layer.lora_U * layer.lora_S).detach() @ layer.lora_P.detach()
    torch.testing.assert_close(whole, layer.weight.detach(), rtol=1e-7, atol=1e-8)


def test_the_root_of_the_second_moment_is_the_best_cut_on_the_data() -> None:
    """SVD(W C^½) minimises the error of the layer's outputs; plain triplets and those of asvd do not."""
    X = torch.cat(calibration())
    errors = {}
    for basis, power in (("corda", 0.5), ("asvd", None), ("svd", None)):
        layer, _ = attached("antipasto_gain", basis, r=4, power=power)
        cut = (layer.lora_U * layer.lora_S).detach() @ layer.lora_P.detach()
        errors[basis] = float((X @ (layer.weight.detach() - cut).T).norm())
    assert errors["corda"] < errors["asvd"] < errors["svd"], errors


def test_what_is_mixed_is_of_one_size() -> None:
    """The coordinates h that the mixing core's A reads: with the moment itself in the basis they are as unequal as the
    inputs' directions, upside down, and hardly anything is learnt (0 % where the root has 78 %, docs/results.md)."""
    X = torch.cat(calibration())
    spread = {}
    for power in (None, 0.5, 1):
        layer, _ = attached("antipasto_mix", "corda", power=power)
        sizes = (X @ layer.lora_P.detach().T).norm(dim=0)
        spread[power] = float(sizes.max() / sizes.min())
    assert spread[None] == spread[0.5] < 1.2, spread
    assert spread[1] > 3, spread


class Pair(nn.Module):
    """Two layers that receive the same tensor, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = base(24, 16)[0], base(24, 8)[0], base(16, 24)[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.q(x))) + self.k(x).sum()


@pytest.mark.parametrize("basis", BASES[1:])
def test_layers_that_share_an_input_have_the_bases_they_have_alone(basis: str) -> None:
    together = Pair()
    ll.attach(together, config("antipasto_gain", basis), calibration_data=calibration())
    for name in ("q", "k", "o"):
        alone = Pair()
        ll.attach(alone, config("antipasto_gain", basis, target_names=(f"^{name}$",)), calibration_data=calibration())
        for tensor in ("lora_U", "lora_S", "lora_P"):
            got, expected = (getattr(model.get_submodule(name), tensor).detach() for model in (together, alone))
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


def test_padding_does_not_change_a_basis() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = base()[0]

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.inner(x)

    made = []
    for filler in (0.0, 100.0):
        model, x = Masked(), torch.stack(calibration())
        mask = torch.ones(x.shape[:2])
        mask[:, 30:] = 0
        x[:, 30:] = filler
        data = [{"x": x, "attention_mask": mask}]
        ll.attach(model, config("antipasto_gain", "asvd"), calibration_data=data)
        made.append(model.inner.lora_P.detach())
    assert torch.equal(*made)


@pytest.mark.parametrize(
    ("name", "basis"), [*((name, basis) for name in NAMES for basis in BASES), ("antipasto", "svd")]
)
def test_strength_steers_both_ways(name: str, basis: str) -> None:
    """α and −α change the output by opposite amounts, 0 by none, and a row of the batch has its own."""
    model = base()
    cfg = ll.AntiPaSTOConfig(r=8) if name == "antipasto" else config(name, basis)
    ll.attach(model, cfg, calibration_data=None if basis == "svd" else calibration())
    moved(model[0])
    x = torch.randn(3, 24).double()
    with torch.no_grad(), ll.disabled(model):
        frozen = model(x)
    effect = model(x).detach() - frozen
    assert effect.abs().max() > 0.1
    for alpha in (0.5, 1.0, 2.0):
        ways = []
        for sign in (1, -1):
            with torch.no_grad(), ll.strength(model, {"default": sign * alpha}):
                ways.append(model(x) - frozen)
        torch.testing.assert_close(ways[0], alpha * effect, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(ways[1], -ways[0], rtol=1e-9, atol=1e-10)
    with torch.no_grad(), ll.strength(model, {"default": 0.0}):
        assert torch.equal(model(x), frozen)
    with torch.no_grad(), ll.strength(model, {"default": torch.tensor([-1.0, 0.0, 1.0]).double()}):
        expected = frozen + torch.tensor([-1.0, 0.0, 1.0]).double()[:, None] * effect
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("name", NAMES)
def test_a_file_holds_its_basis(name: str, basis: str, tmp_path: Path) -> None:
    """Loading needs no data, and refuses another base."""
    model, x = base(), torch.randn(3, 24).double()
    ll.attach(model, config(name, basis), calibration_data=None if basis == "svd" else calibration())
    moved(model[0])
    expected = model(x)
    ll.save(model, tmp_path / "a.safetensors")
    ll.detach(model)
    for target in (model, base()):
        ll.load(target, tmp_path / "a.safetensors")
        assert torch.equal(target(x), expected)
    torch.manual_seed(5)
    with pytest.raises(ll.BaseMismatch):
        ll.load(nn.Sequential(nn.Linear(24, 16)).double(), tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("name", "count", "dead"),
    [("antipasto_gain", 8, []), ("antipasto_ablate", 8 * 4 + 4, ["lora_C"]), ("antipasto_mix", 8 + 128, ["lora_A"])],
)
def test_counts_and_what_is_dead_at_step_0(name: str, count: int, dead: list[str]) -> None:
    layer, x = attached(name)
    trained = {key: p for key, p in layer.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == count
    layer(x).square().sum().backward()
    assert [key for key, p in trained.items() if not p.grad.abs().max() > 0] == dead


def test_directions_start_at_random_from_the_seed() -> None:
    start = [attached("antipasto_ablate", r=16, k=16)[0].lora_C.detach() for _ in "ab"]
    assert torch.equal(*start)
    assert float(start[0].std()) == pytest.approx(16**-0.5, rel=0.15)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("antipasto_gain", {"basis": "pca"}, "AntiPaSTOGainConfig(basis='pca'): give one of svd, corda, asvd"),
        ("antipasto_mix", {"power": 1}, "AntiPaSTOMixConfig(power=1): basis='svd' has no statistic; leave it None"),
        (
            "antipasto_ablate",
            {"basis": "corda", "power": 2},
            "AntiPaSTOAblateConfig(power=2): basis='corda' takes 1 (as published) or 0.5 of the second moment",
        ),
        (
            "antipasto_gain",
            {"basis": "asvd", "power": 0},
            "AntiPaSTOGainConfig(power=0): basis='asvd' takes a power above 0 and at most 2",
        ),
        ("antipasto_mix", {"k": 0}, "AntiPaSTOMixConfig(k=0): the mixing matrix has a rank of at least 1"),
        ("antipasto_ablate", {"k": 0}, "AntiPaSTOAblateConfig(k=0): give the number of directions, at least 1"),
    ],
)
def test_bad_configs(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ll.ConfigError) as caught:
        ll.LoraLiteConfig(variant=name, **fields)
    assert str(caught.value) == message


def test_what_does_not_fit_a_layer() -> None:
    for name in NAMES:
        with pytest.raises(ll.TargetError, match="0 has 16 singular values and cannot have r=17; lower r or use rank_"):
            ll.attach(base(), config(name, r=17))
    with pytest.raises(ll.TargetError, match="0: k=9 directions in r=8 singular coordinates; k is at most 8"):
        ll.attach(base(), config("antipasto_ablate", k=9))


def test_data_and_basis_must_fit() -> None:
    model = base()
    with pytest.raises(ll.CalibrationError, match="basis='svd' looks at the weight alone; leave calibration_data out"):
        ll.attach(model, config("antipasto_gain"), calibration_data=calibration())
    with pytest.raises(ll.CalibrationError, match="variant 'antipasto_mix' needs calibration data"):
        ll.attach(model, config("antipasto_mix", "corda"))
    for basis in BASES[1:]:
        with pytest.raises(ll.CalibrationError, match="all inputs in the calibration data are zero"):
            ll.attach(model, config("antipasto_gain", basis), calibration_data=[torch.zeros(4, 24).double()])
    assert list(model.state_dict()) == ["0.weight", "0.bias"]


@pytest.mark.slow
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("name", NAMES)
def test_it_learns(name: str, basis: str) -> None:
    from lora_lite_bench.runs.run import Job, run

    lr = ll.get_variant(name).bench["lr"]
    job = Job("shifted", {"batch_size": 64}, name, {"r": 64, "basis": basis}, seed=0, lr=lr, steps=30, whole=False)
    losses = run(job).losses
    assert sum(losses[-3:]) / 3 < 0.3 * losses[0], losses
