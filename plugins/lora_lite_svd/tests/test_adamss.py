"""AdaMSS against its formula, its groups and its choice of them written out, and the peft package."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll
from lora_lite_core.testing import variant_checks
from tests.models import token_ids
from tests.oracles import D_IN, D_OUT, assert_same, filled, peft_net, peft_twin, saved_by_peft

peft = pytest.importorskip("peft")
pytest.importorskip("sklearn")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:peft")
X = torch.randn(16, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
GOAL = torch.randn(16, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
SCHEDULE: dict[str, Any] = {"target": 3, "begin": 4, "end": 18, "interval": 5, "power": 1.5}


def config(**fields: Any) -> Any:
    return ll.LoraLiteConfig(**{"variant": "adamss", "r": 2, "subspaces": 3, "dims": 10, **fields})


@variant_checks(config(target=5, begin=0, end=3, interval=1))
def test_promises_while_groups_are_left_out(check: Any) -> None:
    check()


@pytest.mark.slow
@variant_checks(config(like_peft=True, r=4, threshold=0.2))
def test_promises_with_groups_of_peft(check: Any) -> None:
    check()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10, bias=False)).double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("r", [1, 3])
def test_formula(bias: bool, r: int) -> None:
    """Output by output: a product of the output's own row of B, its group's A, and V of the input with a one behind."""
    layer, x = filled(config(r=r), bias=bias)
    A, B = (getattr(layer, name).detach().clone().requires_grad_() for name in ("lora_A", "lora_B"))
    V, ones = layer.lora_V, torch.ones(5, 1, dtype=torch.float64)
    joined = torch.cat([V, layer.lora_v[:, None]], 1) if bias else V
    rows = []
    for j in range(D_OUT):
        group = int(layer.lora_c[j])
        rows.append(B[j] @ A[group * r : (group + 1) * r] @ joined)
    inputs = torch.cat([x, ones], 1) if bias else x
    expected = F.linear(x, layer.weight, layer.bias) + inputs @ torch.stack(rows).T
    assert_same(layer, x, expected, {"lora_A": A, "lora_B": B}, 1e-10)


@pytest.mark.parametrize("bias", [True, False])
def test_start(bias: bool) -> None:
    """V is of the SVD of weight and bias, A of the rows of U of a group."""
    torch.manual_seed(0)
    layer = nn.Linear(D_IN, D_OUT, bias=bias).double()
    ll.attach(nn.Sequential(layer), config(r=2, dims=9))
    joined = torch.cat([layer.weight, layer.bias[:, None]], 1) if bias else layer.weight
    U, _, Vh = torch.linalg.svd(joined.detach(), full_matrices=False)
    V = torch.cat([layer.lora_V, layer.lora_v[:, None]], 1) if bias else layer.lora_V
    same = (V * Vh[:9]).sum(1)
    torch.testing.assert_close(same.abs(), torch.ones(9, dtype=torch.float64), rtol=0, atol=1e-9)
    U = U[:, :9] * same.sign()
    for group in range(3):
        rows = U[layer.lora_c == group]
        A = layer.lora_A[2 * group : 2 * group + 2].detach()
        best = torch.linalg.svd(rows).Vh[: min(2, len(rows))]
        torch.testing.assert_close(A.T @ A, best.T @ best, rtol=0, atol=1e-7)
    assert set(layer.lora_c.tolist()) == {0, 1, 2}
    assert layer.lora_c[0] == 0, "groups are numbered by their first rows"
    assert not layer.lora_B.any()


def test_groups_are_those_that_are_far_apart() -> None:
    """Three kinds of rows are found, whatever k-means begins with."""
    torch.manual_seed(0)
    kinds = 5 * torch.linalg.qr(torch.randn(D_IN, 3)).Q.T[torch.arange(30) % 3]
    found = 0
    for seed in range(6):
        layer = nn.Linear(D_IN, 30, bias=False)
        layer.weight.data = kinds + 0.01 * torch.randn(30, D_IN)
        ll.attach(nn.Sequential(layer), config(dims=3), seed=seed)
        found += torch.equal(layer.lora_c, torch.arange(30) % 3)
    assert found >= 2, "a local optimum now and then"


def test_directions_below_the_threshold_are_left_out() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(D_IN, D_OUT).double()
    ll.attach(nn.Sequential(layer), config(r=4, dims=12, threshold=0.3))
    U = torch.linalg.svd(torch.cat([layer.weight, layer.bias[:, None]], 1).detach()).U[:, :12]
    alive = layer.lora_A.detach().ne(0).any(1).view(3, 4).sum(1).tolist()
    for group in range(3):
        S = torch.linalg.svdvals(U[layer.lora_c == group])
        assert alive[group] == min(4, int((S.square() >= 0.3 * S[0].square()).sum()))
    assert min(alive) < 4


def in_words(layers: list[Any], state: dict[Any, Any], active: list[set[int]], step: int) -> None:
    """A step of the choice, group by group."""
    for i, target in enumerate(layers):
        for name in ("lora_A", "lora_B"):
            now = (target.params[name] * target.params[name].grad).detach().abs()
            mean, unsure = state.get((i, name), (torch.zeros_like(now), torch.zeros_like(now)))
            state[i, name] = 0.85 * mean + 0.15 * now, 0.85 * unsure + 0.15 * (now - mean).abs()
    if step % 5 and step != 18:
        return
    scores = {}
    for i, target in enumerate(layers):
        c = target.params["lora_c"]
        A, B = (state[i, name][0] * state[i, name][1] for name in ("lora_A", "lora_B"))
        for group in active[i]:
            rank = min(2, int((c == group).sum()))
            scores[i, group] = A[2 * group : 2 * group + rank].mean() + B[c == group, :rank].mean()
    count = 3 + int(3 * (1 - (step - 4) / 14) ** 1.5)
    best = sorted(scores, key=lambda key: -float(scores[key]))[:count]
    for i in range(len(layers)):
        active[i] = {group for which, group in best if which == i}
    state.clear()


def test_the_choice_written_out_and_what_is_left_out_stays() -> None:
    model = net()
    adapter = ll.attach(model, config(**SCHEDULE))
    layers = list(adapter.layers().values())
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=3e-2, weight_decay=0.1)
    ll.follow(model, optimizer)
    state: dict[Any, Any] = {}
    active = [{0, 1, 2}, {0, 1, 2}]
    counts, changes = [], []
    for step in range(25):
        F.mse_loss(model(X), GOAL).backward()
        if 4 <= step <= 18:
            in_words(layers, state, active, step)
        optimizer.step()
        optimizer.zero_grad()
        masks = [set(target.params["lora_m"].nonzero().flatten().tolist()) for target in layers]
        assert masks == active, step
        counts.append(sum(map(len, masks)))
        changes.append([change_of(target) for target in layers])
    assert counts[0] == 6
    assert counts[-1] == 3
    assert counts == sorted(counts, reverse=True)
    for i, target in enumerate(layers):
        for group in range(3):
            outputs = target.params["lora_c"] == group
            moved = (changes[-1][i] - changes[-2][i])[outputs].abs().max()
            assert bool(moved > 0) == (group in active[i]), "what is left out keeps its values, to the bit"


def change_of(target: Any) -> Tensor:
    """What the layer adds for an input of ones."""
    ones = torch.ones(1, target.d_in, dtype=torch.float64)
    given = {"x": ones, "y": torch.zeros(1, target.d_out, dtype=torch.float64), "params": target.params}
    return ll.get_variant("adamss").forward({**given, "cfg": target.cfg})[0].detach().clone()  # type: ignore[misc]


def test_training_goes_on_from_a_file_without_a_jump(tmp_path: Path) -> None:
    def steps(model: nn.Module, adapter: ll.Adapter, count: int) -> list[float]:
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=3e-2)
        ll.follow(model, optimizer)
        losses = []
        for _ in range(count):
            loss = F.mse_loss(model(X), GOAL)
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return losses

    model, again = net(), net()
    adapter = ll.attach(model, config(**SCHEDULE))
    steps(model, adapter, 12)
    ll.save(model, tmp_path / "half.safetensors")
    loaded = ll.load(again, tmp_path / "half.safetensors")
    assert steps(model, adapter, 12) == steps(again, loaded, 12)
    masks = [[t.params["lora_m"].tolist() for t in one.layers().values()] for one in (adapter, loaded)]
    assert masks[0] == masks[1]
    assert sum(map(sum, masks[0])) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"subspaces": 0}, r"AdaMSSConfig\(subspaces=0\): it is a whole number of at least 1"),
        ({"dims": 1.5}, r"AdaMSSConfig\(dims=1.5\): dims is a whole number"),
        ({"target": 0}, r"AdaMSSConfig\(target=0\): it is a whole number"),
        ({"interval": 0}, r"AdaMSSConfig\(interval=0\): it is a whole number"),
        ({"threshold": 1.0}, r"AdaMSSConfig\(threshold=1.0\): a share from 0 to below 1"),
        ({"begin": 9, "end": 9}, r"begin=9, end=9\): groups are left out from the first step to the second"),
        ({"beta2": 1}, r"beta2=1\): the share of the old mean is between 0 and 1"),
        ({"power": 0}, r"power=0\): the power of the schedule is a number above 0"),
    ],
)
def test_values_that_make_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ll.ConfigError, match=message):
        config(**fields)


def test_too_large_a_rank() -> None:
    with pytest.raises(ll.TargetError, match=r"AdaMSSConfig\(r=11\) on a layer 24 → 16: r is at most 10"):
        ll.attach(nn.Sequential(nn.Linear(D_IN, D_OUT)), config(r=11))


# The peft package.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dims", [10, 16])
def test_parity(bias: bool, dims: int) -> None:
    """The same groups; the same tensors give the same outputs and gradients."""
    layer, x = filled(config(dims=dims, like_peft=True), torch.float32, bias)
    cfg = peft.AdamssConfig(r=dims, num_subspaces=3, subspace_rank=2, target_modules=["0"])
    _, inner = peft_twin(layer, cfg)
    for group, size in enumerate(layer.lora_c.bincount().tolist()):
        layer.lora_A.data[2 * group + size : 2 * group + 2] = 0  # a group of one output has one direction
    params = dict(layer.named_parameters())
    _, tensors = ll.get_variant("adamss").to_peft({"params": params, "cfg": config(dims=dims), "layer": layer})  # type: ignore[misc]
    A, B = inner.adamss_A["default"], inner.adamss_B["default"]
    assert [tuple(one.shape) for one in (*A, *B)] == [
        tuple(tensors[f"adamss_{side}.{i}"].shape) for side in "AB" for i in range(3)
    ]
    inner.adamss_newB["default"] = tensors["adamss_newB"].detach()
    for side, given in (("A", A), ("B", B)):
        for i, one in enumerate(given):
            one.data.copy_(tensors[f"adamss_{side}.{i}"].detach())
    torch.testing.assert_close(layer(x), inner(x), rtol=1e-5, atol=1e-5)
    layer(x).square().mean().backward()
    inner(x).square().mean().backward()
    scattered = torch.zeros_like(layer.lora_B)
    for i in range(3):
        outputs = inner.seg_result["default"][i]
        scattered[outputs, : B[i].shape[1]] = B[i].grad
        group = int(layer.lora_c[outputs[0]])
        torch.testing.assert_close(
            layer.lora_A.grad[2 * group : 2 * group + len(A[i])], A[i].grad, rtol=1e-4, atol=1e-5
        )
    torch.testing.assert_close(layer.lora_B.grad, scattered, rtol=1e-4, atol=1e-5)


def test_the_start_is_that_of_peft() -> None:
    """The same groups and, up to signs, V, where all singular vectors are taken. PEFT's A is of a random projection, and
    has less of the group's rows than the best one, which is here."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 60))
    cfg = peft.AdamssConfig(r=13, num_subspaces=3, subspace_rank=2, target_modules=["0"])
    inner: Any = peft.get_peft_model(copy.deepcopy(model), cfg).base_model.model[0]
    ll.attach(model, config(dims=13, like_peft=True))
    V = torch.cat([model[0].lora_V, model[0].lora_v[:, None]], 1)
    signs = (V * inner.adamss_newB["default"]).sum(1)
    torch.testing.assert_close(signs.abs(), torch.ones(13), rtol=0, atol=1e-3)
    U = torch.linalg.lstsq(V.T, torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach().T).solution.T
    U = U / U.norm(dim=0)
    for i, A in enumerate(inner.adamss_A["default"]):
        outputs = inner.seg_result["default"][i]
        assert len(set(model[0].lora_c[outputs].tolist())) == 1
        group = int(model[0].lora_c[outputs[0]])
        ours = (U[outputs] @ model[0].lora_A[2 * group : 2 * group + 2].T).detach().norm()
        theirs = (U[outputs] @ (A * signs.sign()).T).detach().norm()
        assert 0.8 * ours < theirs < ours * 1.00001


def test_the_choice_is_that_of_peft_which_keeps_one_fewer() -> None:
    """Asked with the same values and gradients: the one that PEFT drops beyond is the last that it should keep."""
    model = net().float()
    adapter = ll.attach(model, config(like_peft=True, **{**SCHEDULE, "begin": 4, "end": 5, "target": 4}))
    fields = {"r": 10, "num_subspaces": 3, "subspace_rank": 2, "target_modules": ["0", "2"], "mask_interval": 5}
    cfg = peft.AdamssConfig(use_asa=True, asa_target_subspaces=4, init_warmup=4, final_warmup=5, **fields)
    theirs = peft.get_peft_model(net().float(), cfg)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-2)
    ll.follow(model, optimizer)
    for step in range(6):
        F.mse_loss(model(X.float()), GOAL.float()).backward()
        for name, target in adapter.layers().items():
            inner = theirs.base_model.model.get_submodule(name)
            for i, (A, B) in enumerate(zip(inner.adamss_A["default"], inner.adamss_B["default"], strict=True)):
                outputs = inner.seg_result["default"][i]
                group = int(target.params["lora_c"][outputs[0]])
                rows = slice(2 * group, 2 * group + len(A))
                A.data.copy_(target.params["lora_A"][rows]), B.data.copy_(target.params["lora_B"][outputs, : len(A)])
                A.grad = target.params["lora_A"].grad[rows].clone()  # type: ignore[index]
                B.grad = target.params["lora_B"].grad[outputs, : len(A)].clone()  # type: ignore[index]
        theirs.base_model.update_and_allocate(step)
        optimizer.step()
        optimizer.zero_grad()
    kept = []
    for name, target in adapter.layers().items():
        inner = theirs.base_model.model.get_submodule(name)
        for i, A in enumerate(inner.adamss_A["default"]):
            group = int(target.params["lora_c"][inner.seg_result["default"][i][0]])
            kept.append((bool(target.params["lora_m"][group]), A.requires_grad))
    assert [ours for ours, _ in kept].count(True) == 4
    assert [one for _, one in kept].count(True) == 3
    assert all(ours for ours, one in kept if one)


@pytest.mark.parametrize(
    "fields", [{}, {"use_asa": True, "final_warmup": 90}, {"use_dynamic_rank": True, "random_seed": 3}]
)
def test_folders_of_peft(fields: dict[str, Any], tmp_path: Path) -> None:
    given = {"r": 12, "num_subspaces": 4, "subspace_rank": 3, "target_modules": ["up_proj", "v_proj"], **fields}
    expected = saved_by_peft(peft.AdamssConfig(**given), tmp_path / "theirs", std=0.3)
    model = peft_net()
    adapter = ll.import_peft(model, tmp_path / "theirs")
    torch.testing.assert_close(model(token_ids()).detach(), expected, rtol=1e-4, atol=1e-4)
    cfg: Any = adapter.cfg
    assert (cfg.r, cfg.subspaces, cfg.dims, cfg.target) == (3, 4, 12, 50 if "use_asa" in fields else None)
    assert cfg.end == fields.get("final_warmup", 1000)
    ll.save(model, tmp_path / "ours.safetensors")
    again = peft_net()
    ll.load(again, tmp_path / "ours.safetensors")
    torch.testing.assert_close(again(token_ids()).detach(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"target": 5, "begin": 0, "end": 3, "interval": 1}])
def test_folders_for_peft(fields: dict[str, Any], tmp_path: Path) -> None:
    """Groups that were left out go there with the values that they have."""
    model = peft_net()
    adapter = ll.attach(model, config(like_peft=True, r=3, target_names=("up_proj", "v_proj"), **fields))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=5e-2)
    ll.follow(model, optimizer)
    before = model(token_ids()).detach()
    for _ in range(6):
        model(token_ids()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = model(token_ids()).detach()
    assert not torch.allclose(before, expected, atol=1e-2)
    ll.export_peft(model, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(peft_net(), tmp_path / "ours").eval()
    torch.testing.assert_close(back(token_ids()).detach(), expected, rtol=1e-4, atol=1e-4)
    again = peft_net()
    ll.import_peft(again, tmp_path / "ours")
    torch.testing.assert_close(again(token_ids()).detach(), expected, rtol=1e-4, atol=1e-4)


def test_groups_that_peft_would_not_find(tmp_path: Path) -> None:
    model = peft_net()
    ll.attach(model, config())
    with pytest.raises(ll.MergeError, match=r"into other groups; attach with AdaMSSConfig\(like_peft=True\) to train"):
        ll.export_peft(model, tmp_path / "none")
    table = nn.Sequential(nn.Embedding(D_IN, D_OUT))
    ll.attach(table, config(target_names=("0",)))
    with pytest.raises(
        ll.MergeError, match="PEFT's AdaMSS takes linear layers with a dense weight, not this Embedding"
    ):
        ll.export_peft(table, tmp_path / "none")


def test_a_folder_of_another_weight(tmp_path: Path) -> None:
    cfg = peft.AdamssConfig(r=8, num_subspaces=3, target_modules=["0"])
    torch.manual_seed(1)
    peft.get_peft_model(nn.Sequential(nn.Linear(D_IN, D_OUT)), cfg).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ll.AdapterFileError, match=r"outputs, and PEFT would put \d+ of this layer into that group"):
        ll.import_peft(nn.Sequential(nn.Linear(D_IN, D_OUT)), tmp_path / "theirs")


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = peft_net()
    ll.attach(model, config())
    monkeypatch.setitem(__import__("sys").modules, "sklearn.cluster", None)
    with pytest.raises(
        ll.ConfigError, match="PEFT finds the groups of AdaMSS by scikit-learn: pip install scikit-learn"
    ):
        ll.export_peft(model, tmp_path / "none")
    with pytest.raises(ll.ConfigError, match="pip install scikit-learn"):
        ll.attach(copy.deepcopy(net()), config(like_peft=True))
