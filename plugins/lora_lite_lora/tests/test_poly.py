"""Poly against its formula, row by row, in calls of a model with tasks, and the peft package's layers and folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_lite as ll
from lora_lite_core.testing import variant_checks
from tests.oracles import D_IN, D_OUT, assert_same, peft_twin

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:peft")
NAMES = ("lora_A", "lora_B", "lora_Z")
IDS = torch.tensor([2, 0, 2, 1, 1])


def config(**fields: Any) -> Any:
    return ll.LoraLiteConfig(**{"variant": "poly", "r": 3, "tasks": 3, "skills": 2, **fields})


@variant_checks(config(tasks=1, skills=3))
def test_promises(check: Any) -> None:
    check()


@pytest.mark.slow
@variant_checks(config(tasks=1, splits=4))
def test_promises_with_splits(check: Any) -> None:
    check()


def adapted(dtype: torch.dtype = torch.float64, **fields: Any) -> tuple[Any, Any]:
    """A model of one layer with random tensors, and the layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D_IN, D_OUT)).to(dtype).eval()
    for parameter in ll.attach(model, config(**fields)).parameters():
        nn.init.normal_(parameter)
    return model, model[0]


class WithTasks(nn.Module):
    """The layer in a call that says the rows' tasks."""

    def __init__(self, model: nn.Module, layer: nn.Module, ids: Any = IDS) -> None:
        super().__init__()
        self.model, self.ids = model, ids
        for name in NAMES:
            setattr(self, name, getattr(layer, name))

    def forward(self, x: Tensor) -> Tensor:
        with ll.context(self.model, task_ids=self.ids):
            return self.model(x)


def one(x: Tensor, task: int, p: dict[str, Tensor], r: int, skills: int, splits: int) -> Tensor:
    """The change of one row: inputs of each split through the mixture of skills of that split, and outputs as well."""
    odds = 1 / (1 + torch.exp(-p["lora_Z"][task]))
    shares = [
        [odds[q * skills + k] / odds[q * skills : (q + 1) * skills].sum() for k in range(skills)] for q in range(splits)
    ]
    n_in, n_out = D_IN // splits, D_OUT // splits
    hidden = torch.zeros(r, dtype=x.dtype)
    for q in range(splits):
        for k in range(skills):
            part = slice(q * n_in, (q + 1) * n_in)
            hidden = hidden + shares[q][k] * p["lora_A"][k * r : (k + 1) * r, part] @ x[part]
    return (
        torch.cat(
            [
                sum(
                    shares[q][k] * p["lora_B"][q * n_out : (q + 1) * n_out, k * r : (k + 1) * r] @ hidden
                    for k in range(skills)
                )
                for q in range(splits)
            ]
        )
        / r
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_formula(splits: int) -> None:
    model, layer = adapted(splits=splits)
    x = torch.randn(5, D_IN, dtype=torch.float64, requires_grad=True)
    p = {name: getattr(layer, name).detach().clone().requires_grad_() for name in NAMES}
    changes = torch.stack([one(row, int(task), p, 3, 2, splits) for row, task in zip(x, IDS, strict=True)])
    expected = x @ layer.weight.T + layer.bias + changes
    assert_same(WithTasks(model, layer), x, expected, p, 1e-10)


def test_every_token_of_a_row_has_its_task() -> None:
    model, _ = adapted(splits=2)
    x = torch.randn(5, 4, 3, D_IN, dtype=torch.float64)
    with ll.context(model, task_ids=IDS):
        got = model(x)
    for row, task in enumerate(IDS.tolist()):
        with ll.context(model, task_ids=task):  # one for all
            torch.testing.assert_close(model(x[row : row + 1]), got[row : row + 1])
    assert not torch.allclose(got[0], got[2])
    with ll.context(model, task_ids=[0, 0, 1, 1, 1]):  # a list does as well
        assert not torch.allclose(model(x), got)


def test_convolutions_have_tasks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)).double().eval()
    for parameter in ll.attach(model, config(target_names=("0",))).parameters():
        nn.init.normal_(parameter)
    x = torch.randn(5, 4, 7, 7, dtype=torch.float64)
    with ll.context(model, task_ids=IDS):
        got = model(x)
    for row, task in enumerate(IDS.tolist()):
        with ll.context(model, task_ids=torch.tensor([task])):
            torch.testing.assert_close(model(x[row : row + 1]), got[row : row + 1])


def test_start() -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    adapter = ll.attach(model, config(splits=4, r=8))
    assert sum(p.numel() for p in adapter.parameters()) == 2 * 8 * (D_IN + D_OUT) + 3 * 4 * 2
    assert 0.9 * (4 / D_IN) ** 0.5 < float(model[0].lora_A.detach().abs().max()) <= (4 / D_IN) ** 0.5
    assert 5e-4 < float(model[0].lora_Z.detach().abs().max()) <= 1e-3
    x = torch.randn(5, D_IN)
    with ll.context(model, task_ids=IDS):
        assert torch.equal(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))


def test_the_draws_of_training_have_the_odds_of_the_mixture() -> None:
    """A relaxed Bernoulli variable is above a half as often as its probability says; each row has its own draw."""
    model, layer = adapted(torch.float32, skills=2)
    model.train()
    layer.lora_Z.data[:] = torch.tensor([1.5, -40.0])  # p of the first is z / (z + 0)
    layer.lora_Z.data[1] = torch.tensor([1.5, 0.0])
    x = torch.ones(4000, D_IN)
    with ll.context(model, task_ids=torch.zeros(4000, dtype=torch.int64)):
        rows = model(x)
    torch.testing.assert_close(rows, rows[:1].expand_as(rows), rtol=1e-3, atol=1e-3)
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    with ll.context(model, task_ids=torch.ones(4000, dtype=torch.int64)):
        rows = model(x).detach() - nn.functional.linear(x[:1], layer.weight, layer.bias).detach()
    hidden, B = (A @ x[0]).unflatten(0, (2, 3)), B.unflatten(-1, (2, 3))
    ends = [[B[:, i] @ hidden[j] / 3 for j in range(2)] for i in range(2)]
    p = torch.linspace(0, 1, 2001)[:, None]
    curve = p * p * ends[0][0] + p * (1 - p) * (ends[0][1] + ends[1][0]) + (1 - p) ** 2 * ends[1][1]
    found = p.flatten()[torch.cdist(rows, curve).argmin(1)]
    # The share of the first is above a half where z₁ > z₂: the difference of two logistic variables is above −1.5.
    u = torch.rand(2, 400_000)
    expected = float((torch.logit(u[0]) - torch.logit(u[1]) > -1.5).float().mean())
    assert float((found > 0.5).float().mean()) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_in_training(reentrant: bool) -> None:
    """Backward runs the layer again with the tasks of its call, and with its draws."""
    model, layer = adapted()
    model.train()
    x = torch.randn(5, D_IN, dtype=torch.float64, requires_grad=True)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.plain = layer, True

        def forward(self, x: Tensor, task_ids: Tensor) -> Tensor:
            return self.inner(x) if self.plain else checkpoint(self.inner, x, use_reentrant=reentrant)

    outer, found = Outer(), []
    ll.detach(model)
    adapter = ll.attach(outer, config())
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    for outer.plain in (True, False):
        torch.manual_seed(3)
        outer(x, IDS).square().sum().backward()
        found.append([p.grad.clone() for p in adapter.parameters()])
        outer.zero_grad()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled() -> None:
    model, _ = adapted(torch.float32)
    x = torch.randn(5, D_IN)
    with ll.context(model, task_ids=IDS):
        expected = model(x)
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)


def test_refusals() -> None:
    model, _ = adapted()
    x = torch.randn(5, D_IN, dtype=torch.float64)
    with pytest.raises(
        ll.ModelStateError, match=r"Poly has 3 tasks: say those of the rows, ll.context\(model, task_ids"
    ):
        model(x)
    with (
        ll.context(model, task_ids=IDS),
        pytest.raises(ll.ModelStateError, match=r"5 task_ids for an input \(4, 24\); one for each row, or for all"),
    ):
        model(x[:4])
    for wrong in (3, -1):
        with ll.context(model, task_ids=torch.tensor([wrong] * 5)), pytest.raises(IndexError):
            model(x)
    with pytest.raises(ll.MergeError, match="poly"):
        ll.merge(model)
    with pytest.raises(ll.ConfigError, match=r"PolyConfig\(skills=0\): it is a whole number of at least 1"):
        config(skills=0)
    with pytest.raises(ll.TargetError, match=r"PolyConfig\(splits=5\) on a layer 24 → 16: splits divides both"):
        ll.attach(nn.Sequential(nn.Linear(24, 16)), config(splits=5))


# The peft package.


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("splits", [1, 2])
def test_parity(splits: int, training: bool) -> None:
    """The same tensors give the same outputs and gradients; in training with the same seed, too."""
    from peft import PolyConfig

    model, layer = adapted(torch.float32, splits=splits)
    cfg = PolyConfig(r=3, n_tasks=3, n_skills=2, n_splits=splits, target_modules=["0"])
    theirs, inner = peft_twin(layer, cfg)

    def as_theirs(tensors: tuple[Tensor, ...]) -> list[Tensor]:
        given = {"params": dict(zip(NAMES, tensors, strict=True)), "cfg": config(splits=splits), "layer": layer}
        return list(ll.get_variant("poly").to_peft(given)[1].values())  # type: ignore[misc]

    ours = tuple(getattr(layer, name) for name in NAMES)
    parameters = [inner.poly_lora_A["default"], inner.poly_lora_B["default"]]
    parameters.append(inner.poly_router["default"].module_logits)
    for parameter, value in zip(parameters, as_theirs(ours), strict=True):
        parameter.data.copy_(value.detach())
    x = torch.randn(5, 4, D_IN)
    model.train(training), theirs.train(training)
    torch.manual_seed(7)
    got = WithTasks(model, layer)(x)
    torch.manual_seed(7)
    expected = theirs.base_model(x, task_ids=IDS)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    gradients = as_theirs(torch.autograd.grad(got.square().mean(), ours))
    for a, b in zip(gradients, torch.autograd.grad(expected.square().mean(), parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D_IN, D_OUT), nn.Tanh(), nn.Linear(D_OUT, D_IN)).eval()


@pytest.mark.parametrize("splits", [1, 4])
def test_folders_both_ways(splits: int, tmp_path: Path) -> None:
    import peft

    fields: dict[str, Any] = {"r": 3, "n_tasks": 3, "n_skills": 2, "n_splits": splits, "target_modules": ["0", "2"]}
    theirs = peft.get_peft_model(net(), peft.PolyConfig(**fields)).eval()
    for name, parameter in theirs.named_parameters():
        if "poly_" in name:
            nn.init.normal_(parameter)
    x = torch.randn(5, 4, D_IN)
    expected = theirs.base_model(x, task_ids=IDS).detach()
    theirs.save_pretrained(tmp_path / "theirs")
    model = net()
    adapter = ll.import_peft(model, tmp_path / "theirs")
    assert {(t.cfg.tasks, t.cfg.skills, t.cfg.splits, t.cfg.r) for t in adapter.layers().values()} == {
        (3, 2, splits, 3)
    }
    with ll.context(model, task_ids=IDS):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    ll.export_peft(model, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(net(), tmp_path / "ours").eval()
    torch.testing.assert_close(back.base_model(x, task_ids=IDS), expected, rtol=1e-4, atol=1e-5)


def test_a_folder_of_another_kind_of_router(tmp_path: Path) -> None:
    model, _ = adapted(torch.float32)
    ll.export_peft(model, tmp_path / "ours")
    path = tmp_path / "ours/adapter_config.json"
    path.write_text(path.read_text().replace('"poly_type": "poly"', '"poly_type": "task"'))
    with pytest.raises(ll.AdapterFileError, match="poly_type='task': PEFT has 'poly' alone"):
        ll.import_peft(nn.Sequential(nn.Linear(D_IN, D_OUT)), tmp_path / "ours")
