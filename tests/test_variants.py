"""What every installed variant must show, on a small net. The methods' own equations are tested in plugins/*/tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lora_lite as ll

from .models import net, token_ids, train, weights_hash
from .usual import SPREAD, USUAL_LR

VARIANTS = SPREAD


SMALL: dict[str, dict[str, Any]] = {
    "oft": {"block_size": 8},
    "ssvd": {"r": 4},
    "antipasto": {"r": 8},
    "trainable_tokens": {"rows": (1, 5), "target_names": ()},
}


def config(name: str, **fields: Any) -> ll.AdapterConfig:
    rank = {"r": 4} if issubclass(ll.get_variant(name).Config, ll.RankConfig) else {}
    return ll.LoraLiteConfig(variant=name, **{**rank, **SMALL.get(name, {}), **fields})


def attach(model: nn.Module, cfg: ll.AdapterConfig) -> ll.Adapter:
    """With calibration data where the variant needs some."""
    if cfg.variant == "eva":
        data = (
            [torch.randn(40, 8, dtype=torch.float64)]
            if isinstance(model, nn.Sequential)
            else [token_ids(i) for i in range(4)]
        )
        return ll.attach(model, cfg, calibration_data=data)
    return ll.attach(model, cfg)


def assert_identity(name: str, got: torch.Tensor, base: torch.Tensor) -> None:
    atol = ll.get_variant(name).identity_atol
    if atol and got.dtype in (torch.float32, torch.float64):
        assert float((got - base).detach().abs().max()) <= atol
    elif atol:
        torch.testing.assert_close(got, base)
    else:
        assert torch.equal(got, base)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_identity_at_step_0(name: str, dtype: torch.dtype, bias: bool) -> None:
    model = net(dtype, bias=bias)
    base = model(token_ids())
    attach(model, config(name))
    assert_identity(name, model(token_ids()), base)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_is_never_written(name: str, dtype: torch.dtype, tmp_path: Any) -> None:
    model = net(dtype)
    base = set(model.state_dict())
    before = weights_hash(model, base)
    adapter = attach(model, config(name))
    assert weights_hash(model, base) == before
    train(model, adapter)
    assert weights_hash(model, base) == before
    ll.save(model, tmp_path / "a.safetensors")
    ll.detach(model)
    assert weights_hash(model) == before
    ll.load(model, tmp_path / "a.safetensors")
    assert weights_hash(model, base) == before
    ll.detach(model)
    assert weights_hash(model) == before


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_trainable_tensor_moves_and_no_other(name: str, dtype: str) -> None:
    model = net()
    adapter = attach(model, config(name, dtype=dtype))
    before = {key: tensor.detach().clone() for key, tensor in adapter.named_tensors()}
    train(model, adapter, steps=3, lr=1e-3)
    for key, tensor in adapter.named_tensors():
        assert torch.equal(tensor, before[key]) is not tensor.requires_grad, key


@pytest.mark.parametrize("name", VARIANTS)
def test_bfloat16_tensors_do_not_freeze(name: str) -> None:
    """100 AdamW steps with a constant gradient and the method's usual learning rate go most of the way they should."""
    torch.manual_seed(0)
    model, lr = nn.Sequential(nn.Linear(1024, 256)), USUAL_LR[name]
    if name == "hra":  # its directions keep their published size: float32, the default, below 1e-3, as its text says
        assert "below a learning rate of 1e-3 it wants" in (ll.get_variant(name).namespace.__doc__ or "")
        lr = 1e-3
    data = [torch.randn(600, 1024)] if name == "eva" else None
    own = SMALL[name] if name == "trainable_tokens" else {}
    adapter = ll.attach(model, ll.LoraLiteConfig(variant=name, dtype="bfloat16", **own), calibration_data=data)
    moving = {key: tensor for key, tensor in adapter.named_tensors() if tensor.requires_grad}
    before = {key: tensor.detach().clone() for key, tensor in moving.items()}
    for parameter in moving.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(moving.values(), lr=lr, weight_decay=0.0)
    for _ in range(100):
        optimizer.step()
    for key, tensor in moving.items():
        assert float((tensor - before[key]).detach().float().abs().mean()) > 0.5 * 100 * lr, key


@pytest.mark.parametrize("name", VARIANTS)
def test_training_lowers_the_loss(name: str) -> None:
    model, ids = net(), token_ids(7, (8, 6))
    adapter = attach(model, config(name))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "dora"])  # its norm has no gradient, by design
def test_gradients_are_those_of_float64(name: str) -> None:
    model = nn.Sequential(nn.Linear(8, 6)).double()
    adapter = attach(model, config(name, **({"r": 4} if name == "antipasto" else {})))
    generator = torch.Generator().manual_seed(0)
    parameters = list(adapter.parameters())
    for parameter in parameters:
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(3, 8, generator=generator, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        names = [f"0.{key.partition('.')[2]}" for key, t in adapter.named_tensors() if t.requires_grad]
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *(p.detach().requires_grad_() for p in parameters)))


@pytest.mark.parametrize("name", VARIANTS)
def test_autocast_keeps_the_output_dtype_and_the_gradients_full(name: str) -> None:
    model = net()
    adapter = attach(model, config(name))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model.layers[0].up_proj.forward(torch.ones(2, 16)).dtype
        assert model.layers[0].up_proj(torch.ones(2, 16)).dtype == expected
        loss = model(token_ids()).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    model = net()
    adapter = attach(model, config(name))
    train(model, adapter, 1)
    x = torch.randn(2, 3, 16, requires_grad=True)
    gradients = []
    for run in (model.layers[0], lambda x: checkpoint(model.layers[0], x, use_reentrant=reentrant)):
        run(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in adapter.parameters() if p.grad is not None])
        model.zero_grad()
    assert gradients[0]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
