"""Streaming statistics: exact, shared only where tensors are, and nothing of them left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite_core.toolbox import calibration as calibrate
from lora_lite_core.toolbox.calibration import Moments, collect_inputs, principal_directions

from .models import net, snapshot, token_ids


class FakeTarget:
    def __init__(self, name: str, layer: nn.Module) -> None:
        self.name, self.layer, self.d_in, self.stack = name, layer, layer.in_features, None


def targets_of(model: nn.Module) -> list[Any]:
    return [FakeTarget(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]


def moments(model: nn.Module, batches: list[Any], shared: bool = True) -> dict[str, Moments]:
    return collect_inputs(model, targets_of(model), batches, lambda target: Moments(target.d_in), shared=shared)


def test_moments_are_exact() -> None:
    torch.manual_seed(0)
    model, X = nn.Sequential(nn.Linear(6, 5)), torch.randn(50, 6) + 2
    found = moments(model, [X[:1], X[1:30].reshape(1, 29, 6), X[30:]])["0"]
    assert found.count == 50
    torch.testing.assert_close(found.second_moment(center=False).float(), X.T @ X / 50)
    torch.testing.assert_close(found.second_moment(center=True).float(), X.T.cov(correction=0), rtol=1e-4, atol=1e-5)


def test_only_layers_that_receive_the_same_tensor_share() -> None:
    """A deep model under no_grad, where the allocator hands the same addresses to every block."""
    model = net(blocks=12)
    found = moments(model, [token_ids(i, (2, 5)) for i in range(3)])
    groups: dict[int, list[str]] = {}
    for name, statistic in found.items():
        groups.setdefault(id(statistic), []).append(name)
    shared = [names for names in groups.values() if len(names) > 1]
    assert len(shared) == 12
    for names in shared:
        assert {name.rpartition(".")[2] for name in names} == {"q_proj", "v_proj"}
        assert len({name.split(".")[1] for name in names}) == 1, "different blocks are never merged"
    alone = moments(model, [token_ids(i, (2, 5)) for i in range(3)], shared=False)
    for name, statistic in found.items():
        torch.testing.assert_close(statistic.second_moment(center=True), alone[name].second_moment(center=True))
        assert statistic.count == 30


def test_a_layer_that_leaves_its_group_is_an_error() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x if len(x) == 1 else x + 1)

    with pytest.raises(ll.CalibrationError, match="b got the input of a in one batch and another one in the next"):
        moments(Model(), [torch.zeros(1, 4), torch.zeros(2, 4)])


def test_a_layer_that_nothing_reaches_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.unused = nn.Linear(4, 4)
    model.forward = lambda x: model[0](x)  # type: ignore[method-assign]
    with pytest.raises(
        ll.CalibrationError, match=r"no batch of the calibration data reached unused \(1 layers in all\)"
    ):
        moments(model, [torch.zeros(1, 4)])


def test_the_model_is_as_before_also_after_a_failure() -> None:
    model = net().train()
    model.layers[0].eval()
    before, modes = snapshot(model), {name: m.training for name, m in model.named_modules()}
    moments(model, [token_ids(), (token_ids(),), {"ids": token_ids()}])
    with pytest.raises(TypeError):
        moments(model, [{"nonsense": token_ids()}])
    assert snapshot(model) == before
    assert {name: m.training for name, m in model.named_modules()} == modes


def test_nobody_else_sees_that_the_model_is_being_calibrated() -> None:
    class Counting(nn.Sequential):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    model = Counting(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 4))
    seen = []

    class Batches(list[Any]):
        def __iter__(self) -> Any:
            for batch in super().__iter__():
                yield batch
                seen.append(([m.training for m in model], [len(m._forward_pre_hooks) for m in model], model.calls))

    found = moments(model, Batches([torch.randn(3, 6), torch.randn(3, 6)]))
    assert seen == [([True] * 3, [0] * 3, 0)] * 2
    assert found["2"].count == 6


def test_memory_does_not_grow_with_tokens() -> None:
    model = nn.Sequential(nn.Linear(16, 4))
    small = moments(model, [torch.randn(10, 16)])["0"]
    large = moments(model, [torch.randn(1000, 16) for _ in range(20)])["0"]
    sizes = [sum(t.numel() for t in vars(m).values() if isinstance(t, Tensor)) for m in (small, large)]
    assert sizes == [16 + 16 * 16] * 2


@pytest.mark.parametrize("limit", [4096, 10])
def test_principal_directions(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In full, and by subspace iteration."""
    monkeypatch.setattr(calibrate, "EIGH_LIMIT", limit)
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(200, 200, generator=generator, dtype=torch.float64)).Q
    values = 1.1 ** -torch.arange(200, dtype=torch.float64)
    shares, rows = principal_directions((Q * values) @ Q.T, 8)
    torch.testing.assert_close(shares, values[:8] / values.sum(), rtol=1e-4, atol=0)
    outside = rows - rows @ Q[:, :8] @ Q[:, :8].T
    assert float(outside.norm()) < 1e-2
    assert bool((rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all())


def test_outlier_channels_do_not_spoil_the_directions() -> None:
    """Float32 sums and a float64 solve keep small components beside channels a thousand times larger."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(4000, 64, generator=generator) * (1.2 ** -torch.arange(64))
    X[:, :3] *= 1000
    _, rows = principal_directions(moments(nn.Sequential(nn.Linear(64, 2)), [X])["0"].second_moment(center=True), 12)
    exact = X.double() - X.double().mean(0)
    Vh = torch.linalg.svd(exact, full_matrices=False).Vh[:12]
    outside = rows - rows @ Vh.T @ Vh
    assert float(torch.linalg.matrix_norm(outside, 2)) < 1e-3


@pytest.mark.parametrize(
    ("batches", "center", "message"),
    [
        (
            [torch.zeros(9, 4)],
            False,
            "0: all inputs in the calibration data are zero; give batches that the layer does",
        ),
        ([torch.full((9, 4), 1e-30)], False, "0: all inputs in the calibration data are zero"),
        ([torch.full((9, 4), 3.3)], True, "0: all inputs in the calibration data are the same; give other batches"),
        ([torch.full((9, 4), 1e25)], False, "0: inputs in the calibration data are too large to be squared"),
        ([torch.zeros(0, 4)], False, "no row of calibration data reached 0"),
        ([torch.ones(9, 4), torch.full((9, 4), float("nan"))], False, "0 gets inputs with nan or inf from the calib"),
        ([torch.full((9, 4), float("inf"))], False, "0 gets inputs with nan or inf"),
    ],
)
def test_moments_that_say_nothing_are_errors(batches: list[Tensor], center: bool, message: str) -> None:
    with pytest.raises(ll.CalibrationError, match=message):
        moments(nn.Sequential(nn.Linear(4, 4)), batches)["0"].second_moment(center=center)


def test_inputs_may_be_one_vector() -> None:
    found = moments(nn.Sequential(nn.Linear(4, 4)), [torch.arange(4.0)])["0"]
    assert found.count == 1
    torch.testing.assert_close(found.second_moment(center=False).float(), torch.outer(*[torch.arange(4.0)] * 2))


@pytest.mark.parametrize("data", [torch.ones(3, 4), {"input_ids": torch.ones(3, 4)}, "abc", 5])
def test_one_batch_is_not_a_list_of_them(data: Any) -> None:
    with pytest.raises(
        ll.CalibrationError, match=r"variant 'eva' got a \w+ as calibration data; give a list of batches"
    ):
        ll.attach(nn.Sequential(nn.Linear(4, 4)), ll.EVAConfig(r=1), calibration_data=data)
