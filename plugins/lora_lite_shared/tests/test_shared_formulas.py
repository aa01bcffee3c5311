"""Every method of the package against its explicit form: dense matrices, one entry after the other, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll

Params = dict[str, Tensor]
SIZES = [(24, 16), (16, 24), (16, 16)]  # d_in, d_out


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Each gives the output of the adapted layer without its bias, for rows x.


def vera(p: Params, W: Tensor, x: Tensor, cfg: Any) -> Tensor:
    dense = torch.diag(p["lora_b"]) @ p["lora_B"] @ torch.diag(cfg.d0 + p["lora_d"]) @ p["lora_A"]
    return x @ (W + dense).T


def pvera(p: Params, W: Tensor, x: Tensor, cfg: Any) -> Tensor:
    means = torch.diag(cfg.d0 + p["lora_d"][: cfg.r]) @ p["lora_A"][: cfg.r]
    return x @ (W + torch.diag(p["lora_b"]) @ p["lora_B"] @ means).T


def tied_lora(p: Params, W: Tensor, x: Tensor, cfg: Any) -> Tensor:
    B, A = p["lora_B"], p["lora_A"]
    if cfg.vectors:
        A, B = torch.diag(1 + p["lora_u"]) @ A, torch.diag(1 + p["lora_v"]) @ B
    return x @ (W + cfg.scale * B @ A).T


def vb_lora(p: Params, W: Tensor, x: Tensor, cfg: Any) -> Tensor:
    (d_out, d_in), b = W.shape, p["lora_bank"].shape[1]

    def piece(logits: Tensor) -> Tensor:
        best = sorted(range(len(logits)), key=lambda i: -float(logits[i].detach()))[: cfg.topk]
        total = torch.stack([logits[i].exp() for i in best]).sum()
        return torch.stack([logits[i].exp() / total * p["lora_bank"][i] for i in best]).sum(0)

    A = torch.stack([torch.cat([piece(p["lora_logits_A"][k, i]) for i in range(d_in // b)]) for k in range(cfg.r)])
    B = [torch.cat([piece(p["lora_logits_B"][i, k]) for i in range(d_out // b)]) for k in range(cfg.r)]
    return x @ (W + torch.stack(B, 1) @ A).T


def randlora(p: Params, W: Tensor, x: Tensor, cfg: Any) -> Tensor:
    M, n, r = p["lora_B"].shape
    m = p["lora_A"].shape[1]
    total = torch.zeros(M, m).double()
    columns = p["lora_B"].reshape(M, n * r)
    for j in range(n):
        B = torch.stack([columns[:, k * n + j] for k in range(r)], 1)
        total = total + B @ torch.diag(p["lora_l"][:, j]) @ p["lora_A"] @ torch.diag(1 / m + p["lora_g"][j])
    return x @ (W + cfg.scale * (total if W.shape == total.shape else total.T)).T


def uni_lora(p: Params, W: Tensor, x: Tensor, cfg: Any) -> Tensor:
    A, B = (
        torch.stack(
            [torch.stack([p["lora_theta"][j] * p["lora_c"][j] for j in row.long()]) for row in p[f"lora_I_{side}"]]
        )
        for side in "AB"
    )
    return x @ (W + B @ A).T


def tinylora(p: Params, W: Tensor, x: Tensor, cfg: Any) -> Tensor:
    R = sum((v * P for v, P in zip(p["lora_v"], p["lora_P"], strict=True)), torch.zeros(cfg.r, cfg.r).double())
    return x @ (W + p["lora_B"] @ R @ p["lora_A"]).T


def lily(p: Params, W: Tensor, x: Tensor, cfg: Any) -> Tensor:
    shares = []
    for row in x:
        powers = (p["lora_R"] @ p["lora_A"] @ row).exp()
        shares.append(powers / powers.sum())
    if cfg.average:
        shares = [torch.stack(shares).mean(0)] * len(x)
    rows = []
    for row, share in zip(x, shares, strict=True):
        experts = [p["lora_B"][:, e * cfg.r : (e + 1) * cfg.r] for e in range(cfg.experts)]
        mixed = torch.stack([s * B for s, B in zip(share, experts, strict=True)]).sum(0)
        rows.append(W @ row + cfg.scaling * mixed @ p["lora_A"] @ row)
    return torch.stack(rows)


def frod(p: Params, W: Tensor, x: Tensor, cfg: Any) -> Tensor:
    """As published, with U."""
    V, d = p["lora_V"], W.shape[1]
    scaled = W @ torch.linalg.inv(V).T
    norms = scaled.norm(dim=0)
    here = norms > 1e-5 * norms.max()
    U = torch.where(here, scaled / norms.clamp_min(1e-9), 0)
    core = torch.diag(torch.where(here, norms, 0) + p["lora_l"])
    for place, value in zip(p["lora_at"].tolist(), p["lora_s"], strict=True):
        one = torch.zeros(d, d).double()
        one[place // d, place % d] = 1
        core = core + value * one
    return x @ (U @ core @ V.T).T


FORMULAS: dict[str, Callable[[Params, Tensor, Tensor, Any], Tensor]] = {
    one.__name__: one for one in (vera, pvera, tied_lora, vb_lora, randlora, uni_lora, tinylora, lily, frod)
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("vera", {"r": 5}),
    ("vera", {"r": 3, "d0": -0.5}),
    ("pvera", {"r": 5}),
    ("pvera", {"r": 3, "d0": -0.5}),
    ("tied_lora", {"r": 4, "alpha": 6.0}),
    ("tied_lora", {"r": 4, "vectors": False}),
    ("vb_lora", {"r": 3, "num_vectors": 10, "topk": 3}),
    ("vb_lora", {"r": 3, "num_vectors": 10, "topk": 1, "vector_length": 4}),
    ("randlora", {"r": 4, "alpha": 6.0}),
    ("randlora", {"r": 5, "sparse": True}),
    ("uni_lora", {"r": 3, "length": 50}),
    ("tinylora", {"r": 3, "u": 5}),
    ("tinylora", {"r": 2, "u": 4, "tied": True}),
    ("lily", {"r": 4, "scaling": 0.5, "experts": 3}),
    ("lily", {"r": 4, "average": False}),
    ("frod", {"sparsity": 0.05}),
]


def config(name: str, **fields: Any) -> ll.AdapterConfig:
    return ll.LoraLiteConfig(variant=name, **fields)


def attached(cfg: ll.AdapterConfig, sizes: tuple[int, int]) -> tuple[Any, dict[str, Tensor]]:
    """A layer with the adapter, its trained tensors moved, and all of them."""
    layer = nn.Linear(*sizes, dtype=torch.float64).eval()
    layer.weight.data = draw(1, sizes[1], sizes[0])
    adapter = ll.attach(nn.Sequential(layer), cfg)
    for seed, parameter in enumerate(adapter.parameters()):
        parameter.data.add_(draw(100 + seed, *parameter.shape), alpha=0.3)
    return layer, adapter.layers()["0"].params


def assert_equal(layer: Any, x: Tensor, expected: Tensor, p: Params, params: Params) -> None:
    got = layer(x)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    names = [name for name in params if params[name].requires_grad]
    direction = draw(9, *got.shape)
    ours = torch.autograd.grad(got, [x, *(params[name] for name in names)], direction)
    theirs = torch.autograd.grad(expected, [x, *(p[name] for name in names)], direction)
    for name, a, b in zip(("x", *names), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def copies(params: Params) -> Params:
    return {name: t.detach().clone().requires_grad_(t.requires_grad) for name, t in params.items()}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("name", "fields"), CASES, ids=str)
def test_output_and_gradients(name: str, fields: dict[str, Any], sizes: tuple[int, int]) -> None:
    cfg = config(name, **fields)
    layer, params = attached(cfg, sizes)
    x = draw(3, 5, sizes[0]).requires_grad_()
    p = copies(params)
    assert_equal(layer, x, FORMULAS[name](p, layer.weight.detach(), x, cfg) + layer.bias.detach(), p, params)


def test_pvera_in_training() -> None:
    cfg: Any = config("pvera", r=3)
    layer, params = attached(cfg, (24, 16))
    layer.train()
    x, p = draw(3, 5, 24).requires_grad_(), copies(params)
    torch.manual_seed(7)
    noise = torch.randn(5, 3, dtype=torch.float64)
    hidden = x @ p["lora_A"].T @ torch.diag(cfg.d0 + p["lora_d"])
    mean, rho = hidden[:, :3], hidden[:, 3:]
    change = (mean + noise * rho.exp().sqrt()) @ p["lora_B"].T * p["lora_b"]
    torch.manual_seed(7)
    assert_equal(layer, x, F.linear(x, layer.weight, layer.bias) + change, p, params)


@pytest.mark.parametrize(("name", "fields"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_step_0(name: str, fields: dict[str, Any], dtype: torch.dtype) -> None:
    """Bit for bit, but for the two whose published start is not the identity: these are near it."""
    layer = nn.Linear(24, 16).to(dtype)
    model, x = nn.Sequential(layer), torch.randn(5, 24).to(dtype)
    base = model(x)
    ll.attach(model, config(name, **fields))
    if name in ("vb_lora", "uni_lora"):
        assert not torch.equal(model(x), base) or dtype == torch.bfloat16
        torch.testing.assert_close(model(x), base, rtol=0, atol=1e-2)
    else:
        assert torch.equal(model(x), base)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMULAS)
def test_it_learns(name: str) -> None:
    from lora_lite_bench.runs.run import Job, run

    lr = ll.get_variant(name).bench.get("lr", 5e-3)
    fields = {"r": 8} if name == "tinylora" else {}  # two directions of the weight are too few for this task
    losses = run(Job("shifted", {"batch_size": 64}, name, fields, seed=0, lr=lr, steps=30, whole=False)).losses
    assert sum(losses[-3:]) / 3 < 0.3 * losses[0], losses
