"""Methods of the literature, each a module of tests/variants written from docs/authoring.md alone, against their formula
in float64 (dense matrices, one row of x at a time), against PEFT where it has them, by the kit, and in a short training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite_core.testing import run_checks

FOLDER = Path(__file__).parent / "variants"
NAMES = ["vb_lora", "randlora", "hira", "lora_ga", "lora_dropout", "blob", "lora_moe"]
SIZES = [(24, 16), (16, 24), (16, 16)]  # d_in, d_out


@pytest.fixture(autouse=True)
def _variants(registered: Any) -> None:
    for name in NAMES:
        registered(FOLDER / f"{name}.py", name=name)


def config(name: str, **fields: Any) -> ll.AdapterConfig:
    return ll.LoraLiteConfig(variant=name, **{"r": 4, **fields})


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """24 → 16 → 24 → 24, a layer of each kind of shape."""
    model = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24)).to(dtype)
    for seed, parameter in enumerate(model.parameters()):
        parameter.data.copy_(draw(seed, *parameter.shape) / parameter.shape[-1] ** 0.5)
    return model


def moved(adapter: ll.Adapter) -> None:
    for seed, parameter in enumerate(adapter.parameters()):
        parameter.data.add_(0.3 * draw(100 + seed, *parameter.shape).to(parameter.dtype))


# Formulas: of a layer's tensors and its weight, the change of one output row for one row x. Loops on purpose.


def vb_lora(p: dict[str, Tensor], W: Tensor, x: Tensor, cfg: Any) -> Tensor:
    (d_out, d_in), b = W.shape, cfg.vector_length

    def piece(logits: Tensor) -> Tensor:
        best = sorted(range(len(logits)), key=lambda i: -float(logits[i]))[: cfg.topk]
        total = sum(math.exp(float(logits[i])) for i in best)
        return sum((math.exp(float(logits[i])) / total * p["lora_bank"][i] for i in best), torch.zeros(b).double())

    A, B = torch.zeros(cfg.r, d_in).double(), torch.zeros(d_out, cfg.r).double()
    for k in range(cfg.r):
        for i in range(d_in // b):
            A[k, i * b : (i + 1) * b] = piece(p["lora_logits_A"][k, i])
        for i in range(d_out // b):
            B[i * b : (i + 1) * b, k] = piece(p["lora_logits_B"][i, k])
    return B @ A @ x


def randlora(p: dict[str, Tensor], W: Tensor, x: Tensor, cfg: Any) -> Tensor:
    m = min(W.shape)
    total = torch.zeros(max(W.shape), m).double()
    for j in range(math.ceil(m / cfg.r)):
        gamma = 1 / m + p["lora_g"][j]
        total += p["lora_B"][:, j] @ torch.diag(p["lora_l"][j]) @ p["lora_A"] @ torch.diag(gamma)
    return cfg.scale * (total if W.shape[1] == m else total.T) @ x


def hira(p: dict[str, Tensor], W: Tensor, x: Tensor, cfg: Any) -> Tensor:
    changed = torch.empty_like(W)
    for i, j in [(i, j) for i in range(W.shape[0]) for j in range(W.shape[1])]:
        changed[i, j] = W[i, j] * sum(p["lora_B"][i, k] * p["lora_A"][k, j] for k in range(cfg.r))
    return changed @ x


def lora_ga(p: dict[str, Tensor], W: Tensor, x: Tensor, cfg: Any) -> Tensor:
    now = (p["lora_B0"] + p["lora_dB"]) @ (p["lora_A0"] + p["lora_dA"])
    return cfg.scale * (now - p["lora_B0"] @ p["lora_A0"]) @ x


def lora_dropout(p: dict[str, Tensor], W: Tensor, x: Tensor, cfg: Any) -> Tensor:
    return cfg.scale * p["lora_B"] @ p["lora_A"] @ x


def lora_moe(p: dict[str, Tensor], W: Tensor, x: Tensor, cfg: Any) -> Tensor:
    r, weights = cfg.r, [math.exp(float(row @ x)) for row in p["lora_router"]]
    change = torch.zeros(W.shape[0]).double()
    for e, weight in enumerate(weights):
        part = slice(e * r, (e + 1) * r)
        change += cfg.scale * weight / sum(weights) * p["lora_B"][:, part] @ p["lora_A"][part] @ x
    return change


FORMULAS: dict[str, Callable[[dict[str, Tensor], Tensor, Tensor, Any], Tensor]] = {
    "vb_lora": vb_lora,
    "randlora": randlora,
    "hira": hira,
    "lora_ga": lora_ga,
    "lora_dropout": lora_dropout,
    "blob": lora_dropout,  # in evaluation
    "lora_moe": lora_moe,
}
FIELDS: dict[str, dict[str, Any]] = {"vb_lora": {"num_vectors": 10, "topk": 3}, "hira": {}}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_formula(name: str, sizes: tuple[int, int]) -> None:
    layer = nn.Linear(*sizes, dtype=torch.float64)
    layer.weight.data = draw(1, sizes[1], sizes[0])
    fields = FIELDS.get(name, {"alpha": 6.0})
    given = {"calibration_data": [draw(2, 40, sizes[0])]} if name == "lora_ga" else {}
    adapter = ll.attach(nn.Sequential(layer), config(name, **fields), **given)
    x = draw(3, 5, sizes[0])
    if name != "vb_lora":
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    moved(adapter)
    target = adapter.layers()["0"]
    p = {key: tensor.detach() for key, tensor in target.params.items()}
    cfg: Any = target.cfg
    layer.eval()
    for row, y in zip(x, layer(x).detach(), strict=True):
        expected = (
            layer.weight.detach() @ row + layer.bias.detach() + FORMULAS[name](p, layer.weight.detach(), row, cfg)
        )
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_the_kit_is_green(name: str) -> None:
    results = run_checks(config(name))
    assert [result.message for result in results if not result.ok] == []


def test_blobs_sample_and_penalty() -> None:
    """Flipout: one draw of the deviation for the batch, the signs of which are drawn anew for each row."""
    layer = nn.Linear(6, 5, bias=False, dtype=torch.float64)
    model = nn.Sequential(layer)
    adapter = ll.attach(model, config("blob", r=2, alpha=3.0, kl=0.1, prior=0.3))
    moved(adapter)
    p = {key: tensor.detach() for key, tensor in adapter.layers()["0"].params.items()}
    M, G, B = p["lora_A"], p["lora_G"], p["lora_B"]
    x = draw(4, 6).repeat(100_000, 1)
    torch.manual_seed(0)
    change = (layer.train()(x) - x @ layer.weight.T).detach()
    torch.testing.assert_close(change.mean(0), 1.5 * B @ M @ x[0], rtol=0.02, atol=0.02)
    assert 64 < len(change.mul(1e6).round().unique(dim=0)) <= 2 ** (6 + 2), "one deviation under 8 signs"
    covariance = torch.zeros(5, 5).double()
    many = []
    for seed in range(400):
        torch.manual_seed(seed)
        many.append((layer(x[:64]) - x[:64] @ layer.weight.T).detach() - 1.5 * B @ M @ x[0])
    for row in torch.cat(many):
        covariance += torch.outer(row, row) / (400 * 64)
    expected = torch.zeros(5, 5).double()
    for k in range(2):
        variance = sum(float(G[k, j] ** 4 * x[0, j] ** 2) for j in range(6))
        expected += 1.5**2 * variance * torch.outer(B[:, k], B[:, k])
    torch.testing.assert_close(covariance, expected, rtol=0.15, atol=0.05 * float(expected.abs().max()))
    prior = torch.distributions.Normal(0.0, torch.tensor(0.3).double())
    total = 0.0
    for k in range(2):
        for j in range(6):
            posterior = torch.distributions.Normal(M[k, j], G[k, j] ** 2)
            total += float(torch.distributions.kl_divergence(posterior, prior))
    torch.testing.assert_close(ll.penalty(model).item(), 0.1 * total)


def test_lora_ga_starts_in_the_gradients_directions() -> None:
    model, batches = net(), [draw(seed, 30, 24) for seed in (5, 6)]
    twin = copy.deepcopy(model)
    adapter = ll.attach(model, config("lora_ga", gamma=9.0), calibration_data=batches)
    sum(twin(batch).square().mean() / len(batches) for batch in batches).backward()  # type: ignore[union-attr]
    for name, target in adapter.layers().items():
        gradient = twin.get_submodule(name).weight.grad.double()
        zeta = target.d_out**0.25 / 3
        A, B = target.params["lora_A0"] / zeta, target.params["lora_B0"] / zeta
        for k in range(4):  # pairs of singular vectors, up to the sign
            values, left = torch.linalg.eigh(gradient @ gradient.T)
            rest, right = torch.linalg.eigh(gradient.T @ gradient)
            assert abs(float(A[k] @ right[:, -1 - k])) == pytest.approx(1, abs=1e-7), (values, rest)
            assert abs(float(B[:, k] @ left[:, -5 - k])) == pytest.approx(1, abs=1e-7)


def test_lora_ga_on_four_bits() -> None:
    """As on the dense twin of the 4-bit base; the packed weight is not written."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    packed = nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4"), nn.Tanh(), nn.Linear(64, 64)).to("cpu")
    dense = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    dense.load_state_dict({**packed.state_dict(), "0.weight": ll.dense_weight(packed[0])}, strict=False)
    batches, x = [torch.randn(50, 64) for _ in range(2)], torch.randn(7, 64)
    codes, before = packed[0].weight.data.clone(), packed(x)
    made = [ll.attach(model, config("lora_ga"), calibration_data=batches) for model in (packed, dense)]
    assert torch.equal(packed(x), before)
    for name, target in made[0].layers().items():
        for key in ("lora_A0", "lora_B0"):
            ours, twins = target.params[key], made[1].layers()[name].params[key]
            axis = 1 if key == "lora_A0" else 0
            cosine = nn.functional.cosine_similarity(ours, twins, dim=axis)
            torch.testing.assert_close(cosine.abs(), torch.ones(4), rtol=0, atol=1e-2)
            target.params[key].copy_(twins)
    for adapter in made:
        moved(adapter)
    torch.testing.assert_close(packed(x), dense(x), rtol=1e-2, atol=1e-2)
    optimizer = torch.optim.AdamW(made[0].parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        losses.append(packed(x).square().mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(packed[0].weight.data, codes)


# PEFT, from the same tensors.


def beside_peft(name: str, theirs: Any, fields: dict[str, Any], **given: Any) -> tuple[nn.Module, Any, Any]:
    """The model with our adapter, moved, the adapter, and PEFT's model, whose tensors are drawn anew."""
    model = net(torch.float32)
    torch.manual_seed(0)
    other = peft.get_peft_model(copy.deepcopy(model), theirs)
    adapter = ll.attach(model, config(name, **fields), **given)
    moved(adapter)
    return model, adapter, other.eval()


def same(model: nn.Module, other: Any) -> None:
    x = draw(9, 5, 24, dtype=torch.float32)
    changed = model.eval()(x)
    with ll.disabled(model):
        assert not torch.allclose(model(x), changed, atol=1e-2), "it does something"
    torch.testing.assert_close(changed, other(x), rtol=1e-5, atol=1e-5)


LAYERS = ["0", "2", "4"]


def test_vb_lora_is_that_of_peft() -> None:
    theirs = peft.VBLoRAConfig(r=4, num_vectors=10, vector_length=8, topk=3, target_modules=LAYERS)
    model, adapter, other = beside_peft("vb_lora", theirs, FIELDS["vb_lora"])
    with torch.no_grad():
        for name, target in adapter.layers().items():
            layer = other.base_model.model.get_submodule(name)
            for side in ("A", "B"):
                getattr(layer, f"vblora_logits_{side}")["default"].copy_(target.params[f"lora_logits_{side}"])
            layer.vblora_vector_bank["default"].copy_(target.params["lora_bank"])
    same(model, other)


def test_randlora_is_that_of_peft() -> None:
    """Which pairs row (i, j) of the small side with column (j', i') of the large one in another order: its random
    bases are the same numbers, put elsewhere. Its bases are those of the largest layer, of which each takes a part."""
    theirs = peft.RandLoraConfig(r=4, randlora_alpha=8, target_modules=LAYERS, randlora_dropout=0.0)
    model, adapter, other = beside_peft("randlora", theirs, {"alpha": 8.0})
    A, B = other.base_model.randlora_A["default"], other.base_model.randlora_B["default"]
    with torch.no_grad():
        for name, target in adapter.layers().items():
            layer = other.base_model.model.get_submodule(name)
            m, n = min(target.d_in, target.d_out), layer.num_bases
            flat = B[: max(target.d_in, target.d_out), :n].flatten(1)
            target.params["lora_A"].copy_(A[:, 0, :m])
            target.params["lora_B"].copy_(flat.unflatten(1, (4, n)).transpose(1, 2))
            layer.randlora_lambda["default"].copy_(target.params["lora_l"].T)
            layer.randlora_gamma["default"].copy_(target.params["lora_g"] + 1 / m)
    same(model, other)


def test_hira_is_that_of_peft() -> None:
    theirs = peft.HiraConfig(r=4, target_modules=LAYERS)
    model, adapter, other = beside_peft("hira", theirs, {})
    with torch.no_grad():
        for name, target in adapter.layers().items():
            layer = other.base_model.model.get_submodule(name)
            for side in ("A", "B"):
                getattr(layer, f"hira_{side}")["default"].copy_(target.params[f"lora_{side}"])
    same(model, other)


def test_lora_ga_is_a_lora_of_peft_on_the_weight_that_the_paper_subtracts_from() -> None:
    theirs = peft.LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS)
    given = {"calibration_data": [draw(5, 30, 24, dtype=torch.float32)]}
    model, adapter, other = beside_peft("lora_ga", theirs, {"alpha": 6.0}, **given)
    with torch.no_grad():
        for name, target in adapter.layers().items():
            layer, p = other.base_model.model.get_submodule(name), target.params
            layer.base_layer.weight.sub_(1.5 * p["lora_B0"] @ p["lora_A0"])
            layer.lora_A["default"].weight.copy_(p["lora_A0"] + p["lora_dA"])
            layer.lora_B["default"].weight.copy_(p["lora_B0"] + p["lora_dB"])
    same(model, other)


def test_lora_gas_directions_are_those_of_peft() -> None:
    from peft.tuners.lora import LoraGAConfig, preprocess_loraga

    model, batch = net(torch.float32), draw(5, 60, 24, dtype=torch.float32)
    other = copy.deepcopy(model)
    theirs = peft.LoraConfig(
        r=4, target_modules=LAYERS, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(direction="ArB2r")
    )
    seen = batch.clone().requires_grad_()  # or the hooks of PEFT warn
    preprocess_loraga(other, theirs, lambda: other(seen).square().mean().backward())
    found = peft.get_peft_model(other, theirs)
    adapter = ll.attach(model, config("lora_ga"), calibration_data=[batch])
    for name, target in adapter.layers().items():
        layer = found.base_model.model.get_submodule(name)
        for ours, their, axis in (
            (target.params["lora_A0"], layer.lora_A["default"].weight, 1),
            (target.params["lora_B0"], layer.lora_B["default"].weight, 0),
        ):
            cosine = nn.functional.cosine_similarity(ours, their, dim=axis).abs()
            torch.testing.assert_close(cosine, torch.ones(4), rtol=0, atol=1e-2)


@pytest.mark.parametrize("training", [False, True])
def test_lora_dropout_is_that_of_peft(training: bool) -> None:
    """In training with the same draws, of torch's global generator."""
    theirs = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.4, target_modules=LAYERS)
    model, adapter, other = beside_peft("lora_dropout", theirs, {"alpha": 6.0, "dropout": 0.4})
    with torch.no_grad():
        for name, target in adapter.layers().items():
            layer = other.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(target.params["lora_A"])
            layer.lora_B["default"].weight.copy_(target.params["lora_B"])
    if not training:
        same(model, other)
        return
    x, y = draw(9, 5, 24, dtype=torch.float32), []
    for each in (model, other):
        torch.manual_seed(3)
        y.append(each.train()(x))
    torch.testing.assert_close(*y, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(y[0], model(x), atol=1e-3)


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ll.TargetError, match=r"vector_length=5\) on a layer 24 → 16: \[1, 2, 4, 8\] divide both"):
        ll.attach(net(), config("vb_lora", vector_length=5))
    with pytest.raises(ll.TargetError, match=r"r=9\) on a layer 24 → 16: r is at most 8"):
        ll.attach(net(), config("lora_ga", r=9), calibration_data=[draw(0, 3, 24)])
    with pytest.raises(ll.CalibrationError):
        ll.attach(net(), config("lora_ga"))
    with pytest.raises(ll.ConfigError, match="from 1 to num_vectors=8"):
        config("vb_lora", topk=9, num_vectors=8)
    with pytest.raises(ll.ConfigError, match="at least 1"):
        config("lora_moe", experts=0)


def test_a_mixture_is_not_merged() -> None:
    model = net()
    moved(ll.attach(model, config("lora_moe")))
    with pytest.raises(ll.MergeError):
        ll.merge(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_learns(name: str) -> None:
    from lora_lite_bench.run import Job, run

    lr = ll.get_variant(name).bench.get("lr", 5e-3)
    losses = run(Job("shifted", {"batch_size": 64}, name, {}, seed=0, lr=lr, steps=30, whole=False)).losses
    assert sum(losses[-3:]) / 3 < 0.3 * losses[0], losses
