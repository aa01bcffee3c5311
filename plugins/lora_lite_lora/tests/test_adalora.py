"""AdaLoRA against its formula, its scores and budget written out, and the peft package's allocation and folders."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll
from tests.oracles import D_IN, D_OUT, assert_same

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's own
X = torch.randn(16, 12, generator=torch.Generator().manual_seed(1))
GOAL = torch.randn(16, 10, generator=torch.Generator().manual_seed(2))
SCHEDULE: dict[str, Any] = {"target_r": 2, "total_step": 20, "tinit": 3, "tfinal": 5, "interval": 1}


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10)).to(dtype)


def moved(adapter: ll.Adapter, size: float = 0.5) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=size)


class Training:
    """Of a model with an adapter, step by step."""

    def __init__(self, model: nn.Module, adapter: ll.Adapter, lr: float = 1e-2) -> None:
        self.model, self.adapter = model, adapter
        self.optimizer = torch.optim.AdamW(adapter.parameters(), lr=lr, weight_decay=0.0)
        ll.follow(model, self.optimizer)

    def steps(self, count: int) -> list[Tensor]:
        """All masks after each step."""
        masks = []
        for _ in range(count):
            (F.mse_loss(self.model(X), GOAL) + ll.penalty(self.model)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            masks.append(torch.cat([t.params["lora_m"] for t in self.adapter.layers().values()]).clone())
        return masks


@pytest.mark.parametrize(("d_in", "d_out"), [(D_IN, D_OUT), (D_OUT, D_IN)])
@pytest.mark.parametrize("alpha", [None, 10.0])
def test_formula(d_in: int, d_out: int, alpha: float | None) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(d_in, d_out).double()
    adapter = ll.attach(nn.Sequential(layer), ll.AdaLoRAConfig(r=4, alpha=alpha))
    x = torch.randn(5, d_in, dtype=torch.float64, requires_grad=True)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    moved(adapter, 1.0)
    p = {key: getattr(layer, f"lora_{key}").detach().clone().requires_grad_() for key in "PlQ"}
    change = (alpha or 4.0) / 4 * p["P"] @ torch.diag(p["l"]) @ p["Q"]
    names = {f"lora_{key}": tensor for key, tensor in p.items()}
    assert_same(layer, x, F.linear(x, layer.weight + change, layer.bias), names, 1e-10)
    assert sum(tensor.numel() for tensor in adapter.parameters()) == 4 * (d_in + d_out + 1)


def test_what_is_left_out_has_no_value_and_a_gradient() -> None:
    """The gradient of λ is that of a λ of zero, those of P and Q are zero there."""
    layer = nn.Linear(12, 10).double()
    moved(ll.attach(nn.Sequential(layer), ll.AdaLoRAConfig(r=4)), 1.0)
    layer.lora_m[1] = 0
    P, l, Q = (getattr(layer, f"lora_{key}").detach().clone() for key in "PlQ")
    l[1] = 0
    l.requires_grad_()
    expected = F.linear(X.double(), layer.weight + P @ torch.diag(l) @ Q, layer.bias)
    got = layer(X.double())
    torch.testing.assert_close(got, expected)
    got.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(layer.lora_l.grad, l.grad)
    assert float(l.grad[1].abs()) > 0
    assert not layer.lora_P.grad[:, 1].any()
    assert not layer.lora_Q.grad[1].any()


def test_penalty() -> None:
    model = net(torch.float64)
    adapter = ll.attach(model, ll.AdaLoRAConfig(r=3, orth_reg_weight=0.3))
    total = 0.0
    for target in adapter.layers().values():
        for M in (target.params["lora_P"].T, target.params["lora_Q"]):
            total += sum((float(M[i] @ M[j]) - (i == j)) ** 2 for i in range(3) for j in range(3))
    assert ll.penalty(model).item() == pytest.approx(0.3 * total, rel=1e-6)


def test_budget_and_scores_written_out() -> None:
    """Twenty steps beside a slow account of them: which triplets have the best scores, and how many may stay."""
    model = net(torch.float64)
    adapter = ll.attach(model, ll.AdaLoRAConfig(r=4, beta1=0.7, beta2=0.9, **{**SCHEDULE, "interval": 3}))
    layers = list(adapter.layers().values())
    state: dict[Any, tuple[Tensor, Tensor]] = {}
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=5e-2)
    ll.follow(model, optimizer)
    for step in range(20):
        F.mse_loss(model(X.double()), GOAL.double()).backward()
        before = [{name: tensor.detach().clone() for name, tensor in target.params.items()} for target in layers]
        scores = []
        for i, target in enumerate(layers):
            before[i]["lora_l"] *= before[i]["lora_m"]
            each = {}
            for name in ("lora_P", "lora_l", "lora_Q"):
                now = (before[i][name] * target.params[name].grad).abs()
                mean, unsure = state.get((i, name), (torch.zeros_like(now),) * 2)
                mean = 0.7 * mean + 0.3 * now
                unsure = 0.9 * unsure + 0.1 * (now - mean).abs()
                state[i, name], each[name] = (mean, unsure), mean * unsure
            for k in range(4):
                scores.append(each["lora_l"][k] + each["lora_P"][:, k].mean() + each["lora_Q"][k].mean())
        optimizer.step()
        optimizer.zero_grad()
        masks = torch.cat([target.params["lora_m"] for target in layers])
        if step == 15:
            budget, last = 4, masks.clone()
        if step > 15:
            assert torch.equal(masks, last), "the ranks are final"
            continue
        if step <= 3 or (step % 3 and step != 15):
            assert masks.sum() == 8
            continue
        budget = 4 + int(4 * (1 - (step - 3) / 12) ** 3)
        best = sorted(range(8), key=lambda k: -float(scores[k]))[:budget]
        assert sorted(best) == masks.nonzero().flatten().tolist(), step
    assert last.sum() == 4


@pytest.mark.parametrize("fields", [{"target_r": 3}, {"target_r": None}, {"rank_pattern": {"2": 2}, "target_r": 3}])
def test_final_ranks(fields: dict[str, Any]) -> None:
    model = net()
    adapter = ll.attach(model, ll.AdaLoRAConfig(r=5, **{**SCHEDULE, **fields}))
    kept = int(Training(model, adapter).steps(20)[-1].sum())
    assert kept == {3: 6, None: 8}[fields["target_r"]] - ("rank_pattern" in fields)


def test_training_goes_on_from_a_file_without_a_jump(tmp_path: Path) -> None:
    """In the middle of the schedule: the same masks, values and losses as without the file."""
    model = net()
    run = Training(model, ll.attach(model, ll.AdaLoRAConfig(r=4, **SCHEDULE)))
    run.steps(9)
    ll.save(model, tmp_path / "half.safetensors")
    again = net()
    rest = Training(again, ll.load(again, tmp_path / "half.safetensors"))
    torch.testing.assert_close(again(X), model(X), rtol=0, atol=0)
    run.optimizer.state.clear()  # as if both optimizers were new
    ours, theirs = run.steps(11), rest.steps(11)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert [int(mask.sum()) for mask in ours] == [4 + int(4 * max(0, 1 - (k - 3) / 12) ** 3) for k in range(9, 20)]
    torch.testing.assert_close(again(X), model(X), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"total_step": 300}, "tinit=100, tfinal=300, total_step=300, interval=10): ranks are chosen from step tinit"),
        ({"interval": 0}, "interval=0): ranks are chosen"),
        ({"tinit": -1}, "tinit=-1, tfinal=300"),
        ({"target_r": 9}, "AdaLoRAConfig(target_r=9, r=8): ranks only get smaller; from 1 to r"),
        ({"target_r": 0}, "target_r=0, r=8): ranks only"),
        ({"beta1": 1.0}, "AdaLoRAConfig(beta1=1.0): the share of the old mean is between 0 and 1"),
        ({"orth_reg_weight": -1.0}, "orth_reg_weight=-1.0): a weight is a number from 0"),
    ],
)
def test_values_that_make_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ll.ConfigError) as caught:
        ll.AdaLoRAConfig(**fields)
    assert message in str(caught.value)


# The peft package.


def theirs_of(**fields: Any) -> Any:
    given = {"init_r": 4, "target_r": 2, "lora_alpha": 8, "total_step": 20, "tinit": 3, "tfinal": 5}
    return peft.get_peft_model(net(), peft.AdaLoraConfig(**{**given, "target_modules": ["0", "2"], **fields}))


def pairs_of(adapter: ll.Adapter, theirs: Any) -> list[tuple[Tensor, Tensor]]:
    """(ours, theirs), with theirs made equal to ours."""
    pairs = []
    for name, target in adapter.layers().items():
        inner = theirs.base_model.model.get_submodule(name)
        for ours, their in (("lora_Q", "lora_A"), ("lora_l", "lora_E"), ("lora_P", "lora_B")):
            pairs.append((target.params[ours], getattr(inner, their)["default"]))
            pairs[-1][1].data.copy_(target.params[ours].detach().reshape(pairs[-1][1].shape))
    return pairs


def test_parity_with_peft() -> None:
    model, theirs = net(), theirs_of()
    adapter = ll.attach(model, ll.AdaLoRAConfig(r=4, alpha=8.0))
    moved(adapter)
    pairs = pairs_of(adapter, theirs)
    ours, expected = model(X), theirs(X)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)  # theirs divides by r + 1e-5
    found = [torch.autograd.grad(y.square().mean(), [p[i] for p in pairs]) for i, y in enumerate((ours, expected))]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape), rtol=1e-3, atol=1e-4)


def test_the_allocation_is_that_of_peft() -> None:
    """Both asked at the same point of each step, with the same values and gradients."""
    model, theirs = net(), theirs_of()
    adapter = ll.attach(model, ll.AdaLoRAConfig(r=4, alpha=8.0, **SCHEDULE))
    moved(adapter, 0.1)
    pairs = pairs_of(adapter, theirs)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=5e-2)
    ll.follow(model, optimizer)
    for step in range(19):
        F.mse_loss(model(X), GOAL).backward()
        for (name, target), which in zip(adapter.layers().items(), range(2), strict=True):
            assert name == ["0", "2"][which]
            target.params["lora_l"].data.mul_(target.params["lora_m"])
        for ours, their in pairs:
            their.data.copy_(ours.detach().reshape(their.shape))
            their.grad = ours.grad.reshape(their.shape).clone()  # type: ignore[union-attr]
        theirs.base_model.update_and_allocate(step)
        optimizer.step()
        optimizer.zero_grad()
        pattern = theirs.peft_config["default"].rank_pattern
        if step > 3:
            wanted = [flag for key in sorted(pattern) for flag in pattern[key]]
            masks = torch.cat([target.params["lora_m"] for target in adapter.layers().values()])
            assert masks.bool().tolist() == wanted, step


def test_a_pruned_folder_of_peft(tmp_path: Path) -> None:
    """PEFT cuts the tensors to what is left, some layers to nothing, and divides by the rank that it began with."""
    theirs = theirs_of(lora_dropout=0.1)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name and "ranknum" not in name:
            nn.init.normal_(parameter)
    masks = {"0": [True, False, True, True], "2": [False] * 4}
    theirs.peft_config["default"].rank_pattern = {f"{name}.lora_E.default": mask for name, mask in masks.items()}
    for name, mask in masks.items():
        theirs.base_model.model.get_submodule(name).lora_E["default"].data[~torch.tensor(mask)] = 0
    expected = theirs.eval()(X).detach()
    theirs.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs/adapter_config.json").read_text())["rank_pattern"]["2.lora_E"] == [False] * 4
    model = net()
    adapter = ll.import_peft(model, tmp_path / "theirs")
    torch.testing.assert_close(model.eval()(X).detach(), expected, rtol=1e-4, atol=1e-4)
    assert [int(target.params["lora_m"].sum()) for target in adapter.layers().values()] == [3, 0]
    cfg: Any = adapter.cfg
    assert (cfg.r, cfg.target_r, cfg.total_step, cfg.tinit, cfg.tfinal, cfg.interval) == (4, 2, 20, 3, 5, 1)
    assert cfg.dropout == 0.1
    ll.export_peft(model, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(net(), tmp_path / "ours").eval()
    torch.testing.assert_close(back(X).detach(), expected, rtol=1e-4, atol=1e-4)


def test_a_pruned_adapter_of_ours_in_peft(tmp_path: Path) -> None:
    model = net()
    adapter = ll.attach(model, ll.AdaLoRAConfig(r=4, alpha=6.0, rank_pattern={}, **SCHEDULE))
    Training(model, adapter, lr=5e-2).steps(18)
    expected = model.eval()(X).detach()
    assert not torch.allclose(expected, net()(X), atol=1e-2)
    ll.export_peft(model, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(net(), tmp_path / "ours").eval()
    torch.testing.assert_close(back(X).detach(), expected, rtol=1e-4, atol=1e-4)


def test_ranks_of_their_own_do_not_fit_into_peft(tmp_path: Path) -> None:
    model = net()
    ll.attach(model, ll.AdaLoRAConfig(r=4, rank_pattern={"2": 3}, target_r=2))
    with pytest.raises(ll.MergeError, match=r"2 has init_r=3, and PEFT has one for all modules|has lora_alpha"):
        ll.export_peft(model, tmp_path / "none")


@pytest.mark.parametrize(
    ("r", "message"),
    [
        (6, r"lora_E has 4 singular values, but init_r=6 and rank_pattern has none of it"),
        (1_000_000_000, "init_r=1000000000 is more than the 16 dimensions of the layer"),
    ],
)
def test_a_folder_that_was_cut_without_saying_so(tmp_path: Path, r: int, message: str) -> None:
    theirs = theirs_of()
    theirs.save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs/adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "init_r": 6}))
    with pytest.raises(
        ll.AdapterFileError, match=r"lora_E has 4 singular values, but init_r=6 and rank_pattern has no"
    ):
        ll.import_peft(copy.deepcopy(net()), tmp_path / "theirs")
