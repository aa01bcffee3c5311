"""OSF against the published form that writes the weight, its projected gradients, and the peft package."""

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
from tests.oracles import D_IN, D_OUT, assert_parity, assert_same, peft_net, peft_twin, saved_by_peft

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:peft")
SHAPES = [(D_IN, D_OUT), (D_OUT, D_IN), (D_OUT, D_OUT)]


def config(**fields: Any) -> Any:
    return ll.LoraLiteConfig(variant="osf", **fields)


@pytest.mark.slow
@variant_checks(config(keep=56))
def test_promises_of_few_triplets(check: Any) -> None:
    check()


def adapted(d_in: int, d_out: int, dtype: torch.dtype = torch.float64, size: float = 0.5, **fields: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(d_in, d_out)).to(dtype)
    for parameter in ll.attach(model, config(**fields)).parameters():
        nn.init.normal_(parameter, std=size) if size else None
    return model[0]


def split(weight: Tensor, k: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The k largest triplets of the weight, and the others, by another algorithm than the library's."""
    U, S, Vh = torch.linalg.svd(weight.detach(), full_matrices=False)
    return (U[:, :k], S[:k], Vh[:k]), (U[:, k:], S[k:], Vh[k:])


@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
@pytest.mark.parametrize(("keep", "k"), [(0.5, 8), (0.3, 4), (13, 13)])
def test_formula(d_in: int, d_out: int, keep: float, k: int) -> None:
    """W' is the kept triplets and the product of three trained matrices."""
    layer = adapted(d_in, d_out, keep=keep)
    x = torch.randn(5, d_in, dtype=torch.float64, requires_grad=True)
    (U_k, S_k, V_k), _ = split(layer.weight, k)
    p = {key: (getattr(layer, f"lora_{key}0") + getattr(layer, f"lora_d{key}")).detach() for key in "USV"}
    p = {key: value.requires_grad_() for key, value in p.items()}
    weight = U_k @ torch.diag(S_k) @ V_k + p["U"] @ torch.diag(p["S"]) @ p["V"]
    expected = F.linear(x, weight, layer.bias)
    assert_same(layer, x, expected, {f"lora_d{key}": value for key, value in p.items()}, 1e-8)
    trained = sum(parameter.numel() for parameter in layer.parameters() if parameter.requires_grad)
    assert trained == (min(d_in, d_out) - k) * (d_in + d_out + 1)


@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
def test_gradients_have_nothing_of_the_kept_directions(d_in: int, d_out: int) -> None:
    layer = adapted(d_in, d_out)
    (U_k, _, V_k), _ = split(layer.weight, 8)
    x = torch.randn(9, d_in, dtype=torch.float64)
    layer(x).square().mean().backward()
    plain = {key: getattr(layer, f"lora_d{key}").grad.clone() for key in "USV"}
    target = type("T", (), {"params": dict(layer.named_parameters()), "cfg": config()})()
    ll.get_variant("osf").before_step({"targets": (target,), "cfg": target.cfg, "step": 0})  # type: ignore[misc]
    eye = torch.eye(max(d_in, d_out), dtype=torch.float64)
    expected = {"U": (eye[:d_out, :d_out] - U_k @ U_k.T) @ plain["U"], "S": plain["S"]}
    expected["V"] = plain["V"] @ (eye[:d_in, :d_in] - V_k.T @ V_k)
    for key, value in expected.items():
        torch.testing.assert_close(getattr(layer, f"lora_d{key}").grad, value, rtol=1e-7, atol=1e-9)
    assert not torch.allclose(plain["U"], expected["U"], rtol=0.1)


class Run:
    """Steps of training on one layer."""

    def __init__(self, d_in: int, d_out: int, Optimizer: Any, lr: float, follow: bool = True) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(d_in, d_out)).double()
        adapter = ll.attach(self.model, config())
        self.optimizer = Optimizer(adapter.parameters(), lr=lr, weight_decay=0.0)
        if follow:
            ll.follow(self.model, self.optimizer)
        self.x, self.goal = (torch.randn(40, d, dtype=torch.float64) for d in (d_in, d_out))

    def steps(self, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            loss = F.mse_loss(self.model(self.x), self.goal)
            losses.append(loss.item())
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return losses

    def moved(self) -> float:
        """How much of the change of the weight is in the kept directions, on either side."""
        weight = self.model[0].weight.detach().clone()
        (U_k, _, V_k), _ = split(weight, 8)
        ll.merge(self.model)
        change = self.model[0].weight.detach() - weight
        return float(((change @ V_k.T).norm() + (U_k.T @ change).norm()) / change.norm())


@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
def test_sgd_leaves_the_kept_triplets_as_they_are(d_in: int, d_out: int) -> None:
    run = Run(d_in, d_out, torch.optim.SGD, 0.5)
    losses = run.steps(50)
    assert losses[-1] < 0.98 * losses[0]
    assert run.moved() < 1e-7


@pytest.mark.filterwarnings("ignore:.*follow.*:UserWarning")
@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
def test_under_adam_they_move_less_than_half_as_much_as_without(d_in: int, d_out: int) -> None:
    shares = []
    for follow in (True, False):
        run = Run(d_in, d_out, torch.optim.AdamW, 3e-3, follow)
        run.steps(50)
        shares.append(run.moved())
    assert 0.1 < shares[0] < 0.5 * shares[1]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (0, r"OSFConfig\(keep=0\): a whole number of at least 1, or a share between 0 and 1"),
        (2.5, r"OSFConfig\(keep=2.5\): a whole number"),
        (True, r"OSFConfig\(keep=True\): keep is a finite number"),
        ("half", r"OSFConfig\(keep='half'\): keep is a finite number"),
        (float("nan"), r"OSFConfig\(keep=nan\): keep is a finite number"),
    ],
)
def test_values_that_make_no_sense(keep: Any, message: str) -> None:
    with pytest.raises(ll.ConfigError, match=message):
        config(keep=keep)


def test_layers_that_are_too_small() -> None:
    for keep, kept in ((16, 16), (0.05, 0)):
        with pytest.raises(
            ll.TargetError, match=rf"OSFConfig\(keep={keep}\) on a layer 24 → 16: it keeps {kept} of 16"
        ):
            ll.attach(nn.Sequential(nn.Linear(D_IN, D_OUT)), config(keep=keep))


# The peft package.


@pytest.mark.parametrize("rank", [None, 5, 0.7])
def test_parity(rank: Any) -> None:
    """Outputs, and gradients as the optimizer gets them: theirs are projected by hooks, ours before the step."""
    from peft import OSFConfig

    layer = adapted(D_IN, D_OUT, torch.float32, keep=0.5 if rank is None else rank)
    x = torch.randn(5, D_IN)
    _, inner = peft_twin(layer, OSFConfig(effective_rank=rank, target_modules=["0"]))
    theirs = inner.osf_svd_params["default"]
    assert len(theirs["S_low"]) == len(layer.lora_S0)
    for key in "USV":
        theirs[f"{key}_low"].data = (getattr(layer, f"lora_{key}0") + getattr(layer, f"lora_d{key}")).detach().clone()
    pairs = [(getattr(layer, f"lora_d{key}"), theirs[f"{key}_low"]) for key in "S"]
    assert_parity(layer, x, inner, pairs)
    layer(x).square().mean().backward()
    inner(x).square().mean().backward()
    target = type("T", (), {"params": dict(layer.named_parameters()), "cfg": config()})()
    ll.get_variant("osf").before_step({"targets": (target,), "cfg": target.cfg, "step": 0})  # type: ignore[misc]
    for key in "USV":
        ours, expected = getattr(layer, f"lora_d{key}").grad, theirs[f"{key}_low"].grad
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_adam_walks_the_path_of_peft() -> None:
    import peft

    model = nn.Sequential(nn.Linear(D_IN, D_OUT), nn.Tanh(), nn.Linear(D_OUT, D_OUT))
    x, goal = torch.randn(40, D_IN), torch.randn(40, D_OUT)
    losses = []
    for ours in (True, False):
        one: Any = copy.deepcopy(model)
        if ours:
            tensors = list(ll.attach(one, config()).parameters())
        else:
            one = peft.get_peft_model(one, peft.OSFConfig(target_modules=["0", "2"]))
            tensors = [p for p in one.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(tensors, lr=3e-3, weight_decay=0.0)
        if ours:
            ll.follow(one, optimizer)
        losses.append([])
        for _ in range(30):
            loss = F.mse_loss(one(x), goal)
            losses[-1].append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-3, atol=1e-4)
    assert losses[0][-1] < 0.98 * losses[0][0]


@pytest.mark.parametrize(
    "fields", [{}, {"effective_rank": 5}, {"effective_rank": 0.25}, {"rank_pattern": {"up_proj": 3}}]
)
def test_folders_of_peft(fields: dict[str, Any], tmp_path: Path) -> None:
    from peft import OSFConfig

    expected = saved_by_peft(OSFConfig(target_modules=["up_proj", "down_proj"], **fields), tmp_path / "theirs", std=0.3)
    model = peft_net()
    adapter = ll.import_peft(model, tmp_path / "theirs")
    torch.testing.assert_close(model(token_ids()).detach(), expected, rtol=1e-4, atol=1e-4)
    keeps = {name.rpartition(".")[2]: target.cfg.keep for name, target in adapter.layers().items()}
    assert keeps["down_proj"] == fields.get("effective_rank", 0.5)
    ll.save(model, tmp_path / "ours.safetensors")
    again = peft_net()
    ll.load(again, tmp_path / "ours.safetensors")
    torch.testing.assert_close(again(token_ids()).detach(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep", [0.5, 0.3, 6])
def test_folders_for_peft(keep: float, tmp_path: Path) -> None:
    import peft

    model = peft_net()
    adapter = ll.attach(model, config(keep=keep, target_names=("up_proj", "v_proj")))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    expected = model(token_ids()).detach()
    ll.export_peft(model, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(peft_net(), tmp_path / "ours").eval()
    torch.testing.assert_close(back(token_ids()).detach(), expected, rtol=1e-4, atol=1e-4)


def test_what_peft_would_make_something_else_of(tmp_path: Path) -> None:
    """Equal singular values on both sides of the cut: which is the smaller one?"""
    model = nn.Sequential(nn.Linear(D_OUT, D_OUT))
    model[0].weight.data = torch.linalg.qr(torch.randn(D_OUT, D_OUT)).Q
    ll.attach(model, config())
    with pytest.raises(ll.MergeError, match="singular values on both sides of the cut are equal"):
        ll.export_peft(model, tmp_path / "none")
    table = nn.Sequential(nn.Embedding(D_IN, D_OUT))
    ll.attach(table, config(target_names=("0",)))
    with pytest.raises(ll.MergeError, match="PEFT's OSF takes linear layers with a dense weight, not this Embedding"):
        ll.export_peft(table, tmp_path / "none")


def test_a_folder_of_another_size(tmp_path: Path) -> None:
    import peft

    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(D_IN, D_OUT)), peft.OSFConfig(target_modules=["0"]))
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ll.AdapterFileError, match=r"osf_svd_params.U_low is \(16, 8\), not \(20, 8\)"):
        ll.import_peft(nn.Sequential(nn.Linear(D_IN, 20)), tmp_path / "theirs")


def test_ranks_of_their_own_are_read_and_not_written(tmp_path: Path) -> None:
    """PEFT searches these patterns in names, where those of its other methods match whole ones."""
    from peft import OSFConfig

    fields = {"target_modules": ["up_proj", "v_proj"], "rank_pattern": {"0.*up_proj": 3}}
    expected = saved_by_peft(OSFConfig(**fields), tmp_path / "theirs", std=0.3)
    model = peft_net()
    adapter = ll.import_peft(model, tmp_path / "theirs")
    torch.testing.assert_close(model(token_ids()).detach(), expected, rtol=1e-4, atol=1e-4)
    assert sorted(target.cfg.keep for target in adapter.layers().values()) == [0.5, 0.5, 0.5, 3]
    with pytest.raises(ll.MergeError, match="effective_rank"):
        ll.export_peft(model, tmp_path / "none")
