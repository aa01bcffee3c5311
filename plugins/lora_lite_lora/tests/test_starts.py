"""OLoRA, LoRA-GA, CorDA and LoRA-SB: LoRA whose start is made of the weight, of gradients or of inputs. Against their
formulas on dense matrices, their published form that writes the weight, and the peft package."""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll
from tests.oracles import assert_same

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's own
SIZES = [(12, 8), (8, 12), (9, 9)]  # d_in, d_out
OFFSETS = ["olora", "lora_ga", "corda"]


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def linear(d_in: int, d_out: int, dtype: torch.dtype = torch.float64) -> nn.Linear:
    layer = nn.Linear(d_in, d_out, dtype=dtype)
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data.copy_(draw(seed, *parameter.shape))
    return layer


def put(model: nn.Module, name: str, batches: list[Tensor], **fields: Any) -> ll.Adapter:
    given = {} if name == "olora" else {"calibration_data": batches}
    return ll.attach(model, ll.LoraLiteConfig(variant=name, **{"r": 3, **fields}), **given)


def moved(adapter: ll.Adapter, size: float = 1.0) -> None:
    for seed, parameter in enumerate(adapter.parameters()):
        parameter.data.add_(size * draw(100 + seed, *parameter.shape).to(parameter.dtype))


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(linear(12, 16, dtype), nn.Tanh(), linear(16, 10, dtype))


@pytest.mark.parametrize("alpha", [None, 5.0])
@pytest.mark.parametrize(("d_in", "d_out"), SIZES)
@pytest.mark.parametrize("name", OFFSETS)
def test_published_form(name: str, d_in: int, d_out: int, alpha: float | None) -> None:
    """The weight less the start, and a LoRA that begins there."""
    layer, x = linear(d_in, d_out), draw(5, 6, d_in).requires_grad_()
    adapter = put(nn.Sequential(layer), name, [draw(6, 30, d_in)], alpha=alpha)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    moved(adapter)
    scale, p = (alpha or 3.0) / 3, {key: t.detach() for key, t in adapter.layers()["0"].params.items()}
    A, B = ((p[f"lora_{key}0"] + p[f"lora_d{key}"]).requires_grad_() for key in "AB")
    residual = layer.weight.detach() - scale * p["lora_B0"] @ p["lora_A0"]
    assert_same(layer, x, F.linear(x, residual + scale * B @ A, layer.bias), {"lora_dA": A, "lora_dB": B}, 1e-11)


@pytest.mark.parametrize("name", [*OFFSETS, "lora_sb"])
def test_dropout_acts_on_what_is_learnt(name: str) -> None:
    layer, x = linear(12, 8).train(), draw(5, 6, 12)
    adapter = put(nn.Sequential(layer), name, [draw(6, 30, 12)], dropout=0.5)
    base = F.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), base), "the identity, in training, too"
    moved(adapter)
    change = layer.eval()(torch.eye(12).double()) - layer.bias
    torch.manual_seed(3)
    got = layer.train()(x)
    torch.manual_seed(3)
    torch.testing.assert_close(got, base + F.linear(F.dropout(x, 0.5), change.T - layer.weight))


@pytest.mark.parametrize(("name", "most"), [("olora", 8), ("lora_ga", 4), ("corda", 8), ("lora_sb", 8)])
def test_ranks_that_do_not_fit(name: str, most: int) -> None:
    with pytest.raises(ll.TargetError, match=rf"Config\(r=9\) on a layer 12 → 8: r is at most {most}"):
        put(nn.Sequential(linear(12, 8)), name, [draw(6, 30, 12)], r=9)
    put(nn.Sequential(linear(12, 8)), name, [draw(6, 30, 12)], r=most)


@pytest.mark.parametrize("name", ["lora_ga", "corda", "lora_sb"])
def test_data_are_needed(name: str) -> None:
    with pytest.raises(ll.CalibrationError, match=f"variant '{name}' needs calibration data"):
        ll.attach(nn.Sequential(linear(12, 8)), ll.LoraLiteConfig(variant=name, r=2))


def test_values_that_make_no_sense() -> None:
    with pytest.raises(ll.ConfigError, match=r"CorDAConfig\(mode='ipn'\): the modes are 'ipm' and 'kpm'"):
        ll.CorDAConfig(mode="ipn")
    with pytest.raises(ll.ConfigError, match=r"LoRAGAConfig\(gamma=0\): gamma is a number above 0"):
        ll.LoRAGAConfig(gamma=0)
    with pytest.raises(ll.ConfigError, match=r"LoRASBConfig\(first_step=-1.0\): a learning rate is a number from 0"):
        ll.LoRASBConfig(first_step=-1.0)


@pytest.mark.parametrize(("d_in", "d_out"), SIZES)
def test_oloras_start_is_the_qr_decomposition(d_in: int, d_out: int) -> None:
    layer = linear(d_in, d_out)
    p = put(nn.Sequential(layer), "olora", []).layers()["0"].params
    Q, R = torch.linalg.qr(layer.weight.detach())
    torch.testing.assert_close(p["lora_B0"].detach(), Q[:, :3], rtol=0, atol=1e-12)
    torch.testing.assert_close(p["lora_A0"].detach(), R[:3], rtol=0, atol=1e-12)


def gradient(model: nn.Module, batches: list[Tensor]) -> Tensor:
    """Of the mean square of the output, by autograd, of the first layer's weight."""
    twin = copy.deepcopy(model)
    (sum(twin(batch).square().mean() for batch in batches) / len(batches)).backward()  # type: ignore[union-attr]
    return twin[0].weight.grad  # type: ignore[index, no-any-return]


def test_lora_gas_start_is_the_gradients() -> None:
    model, batches = net(torch.float64), [draw(7, 20, 12), draw(8, 10, 12)]
    p = put(model, "lora_ga", batches, gamma=9.0).layers()["0"].params
    U, _, Vh = torch.linalg.svd(gradient(net(torch.float64), batches))
    zeta = 16**0.25 / 3
    for k in range(3):  # singular vectors, up to their signs
        assert abs(float(p["lora_A0"][k] @ Vh[k])) == pytest.approx(zeta, rel=1e-6)
        assert abs(float(p["lora_B0"][:, k] @ U[:, 3 + k])) == pytest.approx(zeta, rel=1e-6)
        assert float(p["lora_A0"][k].norm()) == pytest.approx(zeta, rel=1e-6)


@pytest.mark.parametrize(("mode", "kept"), [("ipm", slice(3)), ("kpm", slice(5, 8))])
def test_cordas_start_is_that_of_weight_times_moment(mode: str, kept: slice) -> None:
    layer, batches = linear(12, 8), [draw(7, 40, 12) * 3, draw(8, 30, 12)]
    p = put(nn.Sequential(layer), "corda", batches, mode=mode, alpha=6.0).layers()["0"].params
    x = torch.cat(batches)
    C = x.T @ x / (x.T @ x).trace() * 12 + 0.01 * torch.eye(12)
    U, S, Vh = torch.linalg.svd(layer.weight.detach() @ C, full_matrices=False)
    expected = (U[:, kept] * S[kept]) @ Vh[kept] @ torch.linalg.inv(C)
    torch.testing.assert_close(2 * (p["lora_B0"] @ p["lora_A0"]).detach(), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(p["lora_B0"].detach().norm(dim=0).square(), S[kept] / 2, rtol=1e-8, atol=0)


def test_corda_keeps_what_the_data_show_in_the_mode_for_it() -> None:
    """On inputs from three dimensions the eight-dimensional output of the smallest triplets is nearly nothing."""
    layer, batches = linear(12, 8), [draw(7, 200, 3) @ draw(9, 3, 12)]
    sizes = {}
    for mode in ("ipm", "kpm"):
        model = nn.Sequential(copy.deepcopy(layer))
        p = put(model, "corda", batches, mode=mode).layers()["0"].params
        sizes[mode] = float((batches[0] @ (p["lora_B0"] @ p["lora_A0"]).T).detach().norm())
    assert sizes["kpm"] < 1e-2 * sizes["ipm"]
    assert sizes["ipm"] == pytest.approx(float((batches[0] @ layer.weight.T).detach().norm()), rel=1e-2)


def test_corda_of_data_of_any_size() -> None:
    starts = []
    for size in (1e-4, 1e4):
        p = put(nn.Sequential(linear(12, 8)), "corda", [size * draw(7, 40, 12)]).layers()["0"].params
        starts.append(p["lora_A0"].detach())
    torch.testing.assert_close(*starts, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("d_in", "d_out"), SIZES)
def test_lora_sbs_formula(d_in: int, d_out: int) -> None:
    layer, x = linear(d_in, d_out), draw(5, 6, d_in).requires_grad_()
    adapter = put(nn.Sequential(layer), "lora_sb", [draw(6, 30, d_in)], alpha=6.0)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    moved(adapter)
    A, B, R = (adapter.layers()["0"].params[f"lora_{key}"].detach().clone() for key in "ABR")
    assert_same(layer, x, F.linear(x, layer.weight + 2 * B @ R.requires_grad_() @ A, layer.bias), {"lora_R": R}, 1e-11)
    assert sum(p.numel() for p in adapter.parameters()) == 9


def test_lora_sbs_start_is_adams_first_step() -> None:
    model, batches = net(torch.float64), [draw(7, 20, 12), draw(8, 10, 12)]
    p = put(model, "lora_sb", batches, first_step=1e-3, alpha=6.0).layers()["0"].params
    step = -1e-3 * gradient(net(torch.float64), batches).sign()
    U, S, Vh = torch.linalg.svd(step, full_matrices=False)
    change = 2 * p["lora_B"] @ p["lora_R"] @ p["lora_A"]
    torch.testing.assert_close(change.detach(), (U[:, :3] * S[:3]) @ Vh[:3], rtol=0, atol=1e-9)
    zero = put(net(torch.float64), "lora_sb", batches).layers()["0"].params
    assert not zero["lora_R"].detach().any()
    torch.testing.assert_close(zero["lora_B"].detach(), p["lora_B"].detach())
    torch.testing.assert_close((p["lora_B"].T @ p["lora_B"]).detach(), torch.eye(3).double())


def test_the_loss_is_the_models_own_or_the_next_tokens() -> None:
    """A model that gives no loss is asked for the next token; one that does, for that."""

    class Language(nn.Module):
        def __init__(self, own: bool) -> None:
            super().__init__()
            self.table, self.layer, self.own = nn.Embedding(11, 12).double(), linear(12, 11), own

        def forward(self, input_ids: Tensor) -> Any:
            logits = self.layer(self.table(input_ids))
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
            return type("Output", (), {"logits": logits, "loss": loss if self.own else None})()

    ids, starts = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(0)), []
    for own in (True, False):
        torch.manual_seed(0)
        model = Language(own)
        cfg = ll.LoraLiteConfig(variant="lora_ga", r=2, target_names=("layer",))
        starts.append(ll.attach(model, cfg, calibration_data=[{"input_ids": ids}]).layers()["layer"].params["lora_A0"])
    torch.testing.assert_close(starts[0].detach(), starts[1].detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["lora_ga", "lora_sb"])
def test_padding_is_no_part_of_the_loss(name: str) -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer = nn.Embedding(11, 12).double(), linear(12, 11)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.layer(self.table(input_ids))

    ids = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:2, 4:] = 0
    starts = []
    for filler in (0, 7):
        torch.manual_seed(0)
        model, cfg = Language(), ll.LoraLiteConfig(variant=name, r=2, target_names=("layer",))
        batch = {"input_ids": ids.where(mask == 1, filler), "attention_mask": mask}
        p = ll.attach(model, cfg, calibration_data=[batch]).layers()["layer"].params
        starts.append(p["lora_A0" if name == "lora_ga" else "lora_A"].detach())
    torch.testing.assert_close(*starts, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["lora_ga", "lora_sb"])
def test_a_gradient_without_a_direction_is_an_error(name: str) -> None:
    """Its singular vectors would be as they come."""
    model = nn.Sequential(linear(12, 12), nn.ReLU(), linear(12, 8))
    model[0].bias.data.fill_(-1e6)
    with pytest.raises(
        ll.CalibrationError, match=r"the gradient of the loss at 2 is zero .* \(2 layers in all\); give"
    ):
        put(model, name, [draw(6, 30, 12)])


def test_a_weight_that_is_not_finite_has_no_context() -> None:
    model = nn.Sequential(linear(12, 8))
    model[0].weight.data[2, 3] = float("inf")
    with pytest.raises(ll.ModelStateError, match="group_init of variant 'corda' .*does a weight hold"):
        put(model, "corda", [draw(6, 30, 12)])
    assert list(model.state_dict()) == ["0.weight", "0.bias"]


def test_corda_of_nothing_is_an_error() -> None:
    with pytest.raises(ll.CalibrationError, match="0: all inputs in the calibration data are zero"):
        put(nn.Sequential(linear(12, 8)), "corda", [torch.zeros(30, 12).double()])


# The peft package.

X = draw(9, 7, 12, dtype=torch.float32)
STARTS: dict[str, Any] = {
    "olora": lambda: peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"], init_lora_weights="olora"),
    "corda": lambda: peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["0", "2"],
        init_lora_weights="corda",
        corda_config=peft.tuners.lora.config.CordaConfig(),
    ),
    "lora_ga": lambda: peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["0", "2"], init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig()
    ),
}


def theirs_on(model: nn.Module, name: str, batch: Tensor) -> Any:
    """PEFT's model of the same base, which it changes."""
    other, config = copy.deepcopy(model), STARTS[name]()
    if name == "corda":
        with pytest.MonkeyPatch.context() as patch:  # it takes this name of a package that PEFT does not require
            patch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclasses.dataclass))
            from peft.tuners.lora.corda import preprocess_corda

        preprocess_corda(other, config, run_model=lambda: other(batch))
    if name == "lora_ga":
        seen = batch.clone().requires_grad_()  # or PEFT's hooks warn
        peft.tuners.lora.preprocess_loraga(other, config, lambda: other(seen).square().mean().backward())
    return peft.get_peft_model(other, config)


@pytest.mark.parametrize("name", OFFSETS)
def test_training_is_that_of_peft(name: str) -> None:
    """PEFT's factors are A0 + dA and B0 + dB, on a base from which it has taken B0 A0: same outputs and gradients."""
    model, batch = net(), draw(7, 40, 12, dtype=torch.float32)
    theirs = theirs_on(model, name, batch)
    adapter = put(model, name, [batch], alpha=6.0)
    pairs = []
    for path, target in adapter.layers().items():
        inner, p = theirs.base_model.model.get_submodule(path), target.params
        A, B = inner.lora_A["default"].weight, inner.lora_B["default"].weight
        if name != "lora_ga":  # whose B PEFT multiplies by the gradient's singular values
            torch.testing.assert_close(p["lora_B0"] @ p["lora_A0"], B @ A, rtol=1e-3, atol=1e-4)
        p["lora_A0"].data.copy_(A)
        p["lora_B0"].data.copy_(B)
        for tensor, seed in ((p["lora_dA"], 1), (p["lora_dB"], 2)):
            tensor.data.copy_(0.3 * draw(seed, *tensor.shape))
        A.data.add_(p["lora_dA"].detach())
        B.data.add_(p["lora_dB"].detach())
        pairs += [(p["lora_dA"], A), (p["lora_dB"], B)]
    ours, expected = model(X), theirs(X)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    found = [torch.autograd.grad(y.square().mean(), [p[i] for p in pairs]) for i, y in enumerate((ours, expected))]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_lora_gas_directions_are_those_of_peft() -> None:
    model, batch = net(), draw(7, 60, 12, dtype=torch.float32)
    inner = theirs_on(model, "lora_ga", batch).base_model.model.get_submodule("0")
    p = put(model, "lora_ga", [batch], alpha=6.0).layers()["0"].params
    for ours, their, axis in (
        (p["lora_A0"], inner.lora_A["default"].weight, 1),
        (p["lora_B0"], inner.lora_B["default"].weight, 0),
    ):
        cosine = F.cosine_similarity(ours, their, dim=axis).abs()
        torch.testing.assert_close(cosine.detach(), torch.ones(3), rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", OFFSETS)
def test_peft_loads_the_exported_folder(name: str, tmp_path: Path) -> None:
    model = net()
    cfg = {"alpha": 6.0, "dropout": 0.1, "rank_pattern": {"2": 2}}
    moved(put(model, name, [draw(7, 40, 12, dtype=torch.float32)], **cfg), 0.3)
    ll.export_peft(model.eval(), tmp_path / "ours")
    expected = model(X).detach()
    back = peft.PeftModel.from_pretrained(net(), tmp_path / "ours").eval()
    torch.testing.assert_close(back(X).detach(), expected, rtol=1e-4, atol=1e-5)
    again = net()
    adapter = ll.import_peft(again, tmp_path / "ours")
    assert [target.cfg.r for target in adapter.layers().values()] == [6, 4]
    torch.testing.assert_close(again.eval()(X).detach(), expected, rtol=1e-4, atol=1e-5)


def test_oloras_folder_of_peft(tmp_path: Path) -> None:
    """As it is, the start is made of the weight again; in the form for any base it is a LoRA of rank 2r."""
    theirs = theirs_on(net(), "olora", X)
    theirs.save_pretrained(tmp_path / "start")
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * draw(1, *parameter.shape, dtype=torch.float32))
    expected = theirs.eval()(X).detach()
    theirs.save_pretrained(tmp_path / "as it is")
    model = net()
    adapter = ll.import_peft(model, tmp_path / "as it is")
    assert (adapter.record.variant.name, adapter.cfg.r) == ("olora", 3)
    torch.testing.assert_close(model.eval()(X).detach(), expected, rtol=1e-3, atol=1e-3)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    model = net()
    assert ll.import_peft(model, tmp_path / "converted").cfg.r == 6
    torch.testing.assert_close(model.eval()(X).detach(), expected, rtol=1e-3, atol=1e-3)
