"""What adapters do beside forward: `before_step` under `ll.follow`, and `ll.penalty`."""

from __future__ import annotations

import copy
import itertools
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll

from .distributed import together
from .models import net, token_ids

NAMES = ["adalora", "lora_fa", "vera", "tied_lora"]
FILE = "adapter.safetensors"


def config(name: str) -> ll.AdapterConfig:
    fields: dict[str, Any] = (
        {"target_r": 2, "tinit": 2, "tfinal": 1, "total_step": 9, "interval": 1} if name == "adalora" else {}
    )
    return ll.LoraLiteConfig(variant=name, r=4, **fields)


def loss_of(model: nn.Module, number: int) -> Tensor:
    ids = token_ids(number)
    loss = nn.functional.cross_entropy(model(ids).float().flatten(0, 1), ids.flatten())
    return loss + ll.penalty(model)


def steps(model: nn.Module, optimizer: Any, numbers: range) -> list[float]:
    losses = []
    for number in numbers:
        loss = loss_of(model, number)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adamw(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW(ll.adapters(model)["default"].parameters(), lr=lr, weight_decay=0.0)


def kept(model: nn.Module) -> int:
    return int(sum(t.params["lora_m"].sum() for t in ll.adapters(model)["default"].layers().values()))


def test_the_budget_is_reached_exactly_and_resumed_without_a_jump(tmp_path: Path) -> None:
    """A run that is broken off, saved and loaded goes on as one that is not, both with an optimizer made anew then."""
    model = net()
    adapter = ll.attach(model, config("adalora"))
    optimizer = adamw(model)
    ll.follow(model, optimizer)
    layers, budgets = len(adapter.targets), []
    for number in range(5):
        steps(model, optimizer, range(number, number + 1))
        budgets.append(kept(model))
    assert budgets[0] == 4 * layers
    assert all(a >= b for a, b in itertools.pairwise(budgets))
    assert adapter.record.step == 5
    ll.save(model, tmp_path / FILE)
    assert ll.inspect(tmp_path / FILE).step == 5
    again = net()
    ll.load(again, tmp_path / FILE)
    assert ll.adapters(again)["default"].record.step == 5
    ways = []
    for one in (model, again):
        optimizer = adamw(one)
        ll.follow(one, optimizer)
        ways.append(steps(one, optimizer, range(5, 10)))
        assert kept(one) == 2 * layers
    assert ways[0] == pytest.approx(ways[1], rel=1e-5)
    for (key, t), (_, other) in zip(
        ll.adapters(model)["default"].named_tensors(), ll.adapters(again)["default"].named_tensors(), strict=True
    ):
        torch.testing.assert_close(t, other, rtol=1e-4, atol=1e-5, msg=key)


def test_projected_gradients_are_nearest_to_the_full_one() -> None:
    """The step of B A is then the projection of the step that fine-tuning W would take onto the rows of A."""
    model = nn.Sequential(nn.Linear(6, 5, dtype=torch.float64))
    layer: Any = model[0]
    cfg = ll.LoraLiteConfig(variant="lora_fa", r=2, alpha=6)
    ll.attach(model, cfg)
    x, goal = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    optimizer = torch.optim.SGD([layer.lora_B], lr=0.1)
    ll.follow(model, optimizer)
    (model(x) - goal).square().sum().backward()
    weight = layer.weight.detach().clone().requires_grad_()
    (nn.functional.linear(x, weight, layer.bias) - goal).square().sum().backward()
    optimizer.step()
    A = layer.lora_A.detach()
    onto = torch.linalg.pinv(A) @ A
    assert weight.grad is not None
    torch.testing.assert_close(3 * layer.lora_B.detach() @ A, -0.1 * weight.grad @ onto, rtol=1e-6, atol=1e-8)


def bent(before_step: Any = None, penalty: Any = None) -> SimpleNamespace:
    class Config(ll.AdapterConfig):
        variant = "bent"

    @ll.hookimpl
    def param_specs(d_out: int) -> dict[str, ll.ParamSpec]:
        return {"lora_h": ll.ParamSpec((d_out,))}

    @ll.hookimpl
    def forward(y: Tensor, params: dict[str, Tensor]) -> Tensor:
        return y + params["lora_h"].to(y.dtype)

    given = {"Config": Config, "param_specs": param_specs, "forward": forward}
    given |= {"before_step": ll.hookimpl(before_step)} if before_step else {}
    return SimpleNamespace(**given, **({"penalty": ll.hookimpl(penalty)} if penalty else {}))


def test_what_before_step_is_given(registered: Any) -> None:
    seen: list[Any] = []

    def before_step(targets: Any, cfg: Any, step: int) -> None:
        assert not torch.is_grad_enabled()
        assert all(target.params["lora_h"].grad is not None for target in targets)
        seen.append((step, cfg, [target.name for target in targets]))

    variant = bent(before_step)
    registered(variant, name="bent")
    model = net()
    adapter = ll.attach(model, variant.Config())
    optimizer = adamw(model)
    handle = ll.follow(model, optimizer)
    steps(model, optimizer, range(2))
    assert [step for step, _, _ in seen] == [0, 1]
    assert seen[0][1:] == (adapter.cfg, list(adapter.targets))
    other = adamw(model)
    ll.follow(model, other)  # takes the first one's place
    steps(model, optimizer, range(1))
    assert len(seen) == 2
    steps(model, other, range(1))
    assert [step for step, _, _ in seen] == [0, 1, 2]
    handle.remove()
    with ll.disabled(model):
        other.step()
    ll.detach(model)
    other.step()
    assert len(seen) == 3


def test_optimizers_that_wrap_another(registered: Any) -> None:
    seen: list[int] = []
    variant = bent(lambda step: seen.append(step))
    registered(variant, name="bent")
    model = net()
    ll.attach(model, variant.Config())
    optimizer = adamw(model)
    ll.follow(model, SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer)))
    steps(model, optimizer, range(1))
    assert seen == [0]


def test_wrong_ones(registered: Any) -> None:
    def returns(targets: Any) -> Any:
        return 1

    def reshapes(targets: Any) -> None:
        targets[0].params["lora_h"].data = torch.zeros(3)

    def replaces(targets: Any) -> None:
        targets[0].params["lora_h"] = torch.zeros(3)

    for function, message in (
        (returns, "before_step of variant 'bent' returned something; it changes tensors"),
        (reshapes, "before_step of variant 'bent', on layers.0.self_attn.q_proj, gave lora_h the shape"),
        (replaces, r"target.params\['lora_h'\] = …: a tensor is not replaced but filled in place"),
    ):
        variant = bent(function)
        registered(variant, name="bent")
        model = net()
        ll.attach(model, variant.Config())
        optimizer = adamw(model)
        ll.follow(model, optimizer)
        with pytest.raises(ll.BrokenPlugin, match=message):
            steps(model, optimizer, range(1))
    variant = bent(penalty=lambda params: params["lora_h"])
    registered(variant, name="bent")
    model = net()
    ll.attach(model, variant.Config())
    with pytest.raises(ll.BrokenPlugin, match=r"penalty of variant 'bent' returned a tensor \(16,\); return a scalar"):
        ll.penalty(model)


def test_an_optimizer_of_something_else() -> None:
    model = net()
    ll.attach(model, config("adalora"))
    with pytest.raises(
        ll.ModelStateError, match="the SGD has no parameter of adapter 'default'; make it of adapter.para"
    ):
        ll.follow(model, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1))
    plain = net()
    ll.attach(plain, ll.LoRAConfig(r=2))
    ll.follow(plain, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1))  # nobody acts: nothing to do


def test_training_without_follow_is_said_once(tmp_path: Path) -> None:
    model = net()
    ll.attach(model, config("adalora"))
    optimizer = adamw(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(model, optimizer, range(1))
        model.eval()(token_ids())
        model.train()
    with pytest.warns(
        UserWarning, match=r"adapter 'default' \(adalora\) acts before every optimizer step, and was trained"
    ):
        steps(model, optimizer, range(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(model, optimizer, range(2))
    with pytest.warns(UserWarning, match=r"call ll.follow\(model, optimizer\) once, after the optimizer is made"):
        ll.save(model, tmp_path / FILE)
    ll.follow(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(model, optimizer, range(2))
        ll.save(model, tmp_path / FILE)


def test_scaled_gradients_are_refused_and_skipped_steps_are_not_counted(registered: Any) -> None:
    seen: list[int] = []
    variant = bent(lambda step: seen.append(step))
    registered(variant, name="bent")
    model = net()
    ll.attach(model, variant.Config())
    optimizer: Any = adamw(model)
    ll.follow(model, optimizer)
    loss_of(model, 0).backward()
    optimizer.grad_scale = torch.tensor(2.0)
    with pytest.raises(ll.ModelStateError, match=r"call scaler.unscale_\(optimizer\) before scaler.step"):
        optimizer.step()
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)
    optimizer._optimizer_step_pre_hooks[next(iter(optimizer._optimizer_step_pre_hooks))](optimizer, (), {})
    assert seen == []


def test_with_a_grad_scaler() -> None:
    """It unscales before the hook runs, for optimizers that are not fused: the same as without."""
    runs = []
    for scale in (None, 1024.0):
        model = net()
        ll.attach(model, config("adalora"))
        optimizer = adamw(model)
        ll.follow(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0)
        for number in range(4):
            scaler.scale(loss_of(model, number)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        runs.append(dict(ll.adapters(model)["default"].named_tensors()))
    for key, tensor in runs[0].items():
        torch.testing.assert_close(runs[1][key], tensor)


def test_copies_are_not_followed() -> None:
    model = net()
    ll.attach(model, config("adalora"))
    optimizer = adamw(model)
    ll.follow(model, optimizer)
    steps(model, optimizer, range(2))
    copied = copy.deepcopy(model)
    record = ll.adapters(copied)["default"].record
    assert record.step == 2
    assert record.follower is None


def train_sharded(rank: int, name: str, folder: str) -> None:
    """One of two processes: the same batches in both, so that the mean of gradients is that of one process."""
    from torch.distributed.fsdp import fully_shard

    model = net()
    ll.attach(model, config(name))
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    if name == "tied_lora":
        with pytest.raises(
            ll.ModelStateError, match=r"the Net itself is not, which holds lora_A_4x16, .* for several l"
        ):
            model(token_ids())
    fully_shard(model, mesh=mesh)
    optimizer = adamw(model)
    ll.follow(model, optimizer)
    losses = steps(model, optimizer, range(8))
    whole = {k: t.full_tensor() if hasattr(t, "full_tensor") else t for k, t in model.state_dict().items()}
    if rank == 0:
        torch.save((losses, whole), Path(folder) / "out.pt")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_sharded_over_two_processes_it_is_as_in_one(name: str, tmp_path: Path) -> None:
    together(train_sharded, name, str(tmp_path))
    losses, whole = torch.load(tmp_path / "out.pt", weights_only=True)
    model = net()
    ll.attach(model, config(name))
    optimizer = adamw(model)
    ll.follow(model, optimizer)
    expected = steps(model, optimizer, range(8))
    assert losses == pytest.approx(expected, rel=1e-4)
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(whole[key], tensor, rtol=1e-3, atol=1e-4)
