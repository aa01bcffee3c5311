"""HiRA, PEQA, GLoRA, PEANuT and DEFT: the adapted weight and bias written out in float64, with loops or dense matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll
from tests.oracles import assert_same

SIZES = [(24, 16), (16, 24), (16, 16)]  # d_in, d_out
NAMES = ["deft", "glora", "hira", "peanut", "peqa"]


def config(name: str, **fields: Any) -> Any:
    rank = {} if name == "peqa" else {"r": 4}
    return ll.LoraLiteConfig(variant=name, **{**rank, **fields})


def attached(
    name: str, sizes: tuple[int, int] = (24, 16), biased: bool = True, **fields: Any
) -> tuple[Any, Tensor, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*sizes, bias=biased)).double()
    cfg = config(name, **fields)
    ll.attach(model, cfg)
    return model[0], torch.randn(5, sizes[0], dtype=torch.float64, requires_grad=True), cfg


def tensors(layer: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All tensors of the adapter as leaves, and of them those that are trained."""
    found = {key: p for key, p in layer.named_parameters() if key.startswith("lora_")}
    leaves = {key: p.detach().clone().requires_grad_(p.requires_grad) for key, p in found.items()}
    return leaves, {key: leaf for key, leaf in leaves.items() if leaf.requires_grad}


# The adapted weight and the change of the bias.


def hira(p: dict[str, Tensor], W: Tensor, cfg: Any) -> tuple[Tensor, Any]:
    rows = [W[i] * (1 + sum(p["lora_B"][i, k] * p["lora_A"][k] for k in range(cfg.r))) for i in range(len(W))]
    return torch.stack(rows), 0.0


def peqa(p: dict[str, Tensor], W: Tensor, cfg: Any) -> tuple[Tensor, Any]:
    size = cfg.group_size or W.shape[1]
    scale = p["lora_scale"].reshape(len(W), -1)
    columns = [W[:, j] * (1 + scale[:, j // size]) for j in range(W.shape[1])]
    return torch.stack(columns, 1), 0.0


def deft(p: dict[str, Tensor], W: Tensor, cfg: Any) -> tuple[Tensor, Any]:
    def parts(P: Tensor) -> tuple[Tensor, Tensor]:
        if cfg.decomposition == "relu":
            return P, P * (P > 0)
        made: list[Tensor] = []  # Gram-Schmidt
        for column in P.T:
            for one in made:
                column = column - (column @ one) * one
            made.append(column / column.square().sum().sqrt())
        return torch.stack(made, 1), torch.stack(made, 1)

    P0, scale = p["lora_P0"], (cfg.alpha or cfg.r) / cfg.r
    R = parts(P0)[1].T @ W / scale + p["lora_dR"]
    Q, Z = parts(P0 + p["lora_dP"])
    return (torch.eye(len(W)).double() - Q @ Z.T) @ W + scale * Q @ R, 0.0


def peanut(p: dict[str, Tensor], W: Tensor, cfg: Any) -> tuple[Tensor, Any]:
    act = ACTIVATIONS[cfg.activation]
    columns = []
    for w in W.T:
        h, kept = act(p["lora_A"] @ w), []
        for i in range(cfg.depth):
            kept.append(h)
            h = act(p["lora_E"][i] @ h)
        for i in range(cfg.depth):
            h = act(p["lora_D"][i] @ h) + kept[cfg.depth - 1 - i]
        columns.append(w + cfg.scale * p["lora_B"] @ h)
    return torch.stack(columns, 1), 0.0


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda h: h * (h > 0),
    "gelu": lambda h: 0.5 * h * (1 + torch.erf(h / 2**0.5)),
    "gelu_tanh": lambda h: 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3))),
    "leaky_relu": lambda h: torch.where(h > 0, h, 0.01 * h),
    "mish": lambda h: h * torch.tanh(torch.log1p(h.exp())),
    "relu6": lambda h: torch.where(h > 6, 6.0, torch.where(h > 0, h, 0)),
    "sigmoid": lambda h: 1 / (1 + (-h).exp()),
    "silu": lambda h: h / (1 + (-h).exp()),
    "tanh": lambda h: (h.exp() - (-h).exp()) / (h.exp() + (-h).exp()),
    "linear": lambda h: h,
}


def glora(p: dict[str, Tensor], W: Tensor, cfg: Any, b: Tensor | None = None) -> tuple[Tensor, Any]:
    def part(name: str, shape: tuple[int, ...]) -> Tensor:
        if f"lora_{name}d" in p:
            return (p[f"lora_{name}d"] @ p[f"lora_{name}u"]).reshape(shape)
        value = p.get(f"lora_{name}", torch.zeros(1).double())
        return value.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)

    d_out, d_in = W.shape
    weight = W + W * part("A", (d_out, d_in)) + part("B", (d_out, d_in))
    if b is None:
        return weight, 0.0
    return weight, b * part("D", (d_out,)) + part("E", (d_out,)) + W @ part("C", (d_in,))


CASES: list[tuple[Any, dict[str, Any]]] = [
    (hira, {}),
    (hira, {"r": 1}),
    (peqa, {}),
    (peqa, {"group_size": 8}),
    (peqa, {"group_size": 1}),
    (deft, {}),
    (deft, {"alpha": 6.0}),
    (deft, {"decomposition": "qr", "alpha": 2.0}),
    (peanut, {}),
    (peanut, {"depth": 1, "activation": "tanh", "scale": 0.5}),
    (peanut, {"depth": 3, "activation": "gelu_tanh"}),
    *[(peanut, {"depth": 1, "activation": activation}) for activation in ACTIVATIONS],
    *[
        (glora, {"weight": weight, "prompt": prompt, "bias": bias})
        for weight, prompt, bias in [
            ("lora", "lora", "constant"),
            ("lora", "none", "none"),
            ("vector", "vector", "vector"),
            ("constant", "lora", "none"),
            ("none", "none", "constant"),
            ("none", "vector", "none"),
        ]
    ],
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(
    ("form", "fields", "bias"),
    [(*case, bias) for case in CASES for bias in (True, False) if bias or case[1].get("weight") != "none"],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_the_form_that_writes_the_weight(form: Any, fields: dict[str, Any], bias: bool, sizes: tuple[int, int]) -> None:
    layer, x, cfg = attached(form.__name__, sizes, bias, **fields)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias)), "identity at step 0"
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    p, names = tensors(layer)
    W, b = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    weight, offset = glora(p, W, cfg, b) if form is glora else form(p, W, cfg)
    assert_same(layer, x, F.linear(x, weight, None if b is None else b + offset), names, 1e-10)


@pytest.mark.parametrize(
    ("name", "fields", "count"),
    [
        ("hira", {}, 4 * 40),
        ("peqa", {}, 16),
        ("peqa", {"group_size": 8}, 16 * 3),
        ("deft", {}, 4 * 40),
        ("peanut", {}, 2 * 4 * 16),
        ("peanut", {"depth": 2}, 2 * 4 * 16 + 4 * 16),
        ("glora", {}, 2 * 4 * 40 + 4 * 24 + 4 + 2),
        ("glora", {"weight": "vector", "prompt": "vector", "bias": "vector"}, 2 * 16 + 24 + 2 * 16),
        ("glora", {"weight": "constant", "prompt": "none", "bias": "none"}, 2),
    ],
)
def test_counts_and_liveness(name: str, fields: dict[str, Any], count: int) -> None:
    """After one step everything that is trained has a gradient; at the first step something of each layer has."""
    layer, x, _ = attached(name, **fields)
    trained = [p for key, p in layer.named_parameters() if key.startswith("lora_") and p.requires_grad]
    assert sum(p.numel() for p in trained) == count
    optimizer = torch.optim.SGD(trained, lr=0.1)
    layer(x).square().sum().backward()
    assert any(float(p.grad.abs().max()) > 0 for p in trained)
    optimizer.step()
    optimizer.zero_grad()
    layer(x).square().sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in trained)


def test_hiras_change_has_full_rank() -> None:
    layer, _, _ = attached("hira", (16, 16), r=2)
    nn.init.normal_(layer.lora_B)
    change = layer(torch.eye(16).double()) - F.linear(torch.eye(16).double(), layer.weight, layer.bias)
    assert torch.linalg.matrix_rank(change.detach()) == 16
    assert torch.linalg.matrix_rank((layer.lora_B @ layer.lora_A).detach()) == 2


def test_peqa_gives_the_same_codes_other_scales() -> None:
    """On a weight that is codes × scales by groups, the adapted weight is the same codes times scales (1 + δ)."""
    torch.manual_seed(0)
    codes, scales = torch.randint(-7, 8, (16, 24)).double(), torch.rand(16, 3).double() + 0.1
    layer = nn.Linear(24, 16, bias=False).double()
    layer.weight.data = codes * scales.repeat_interleave(8, 1)
    model = nn.Sequential(layer)
    ll.attach(model, config("peqa", group_size=8))
    layer.lora_scale.data.uniform_(-0.5, 0.5)
    own = (scales * (1 + layer.lora_scale.detach())).repeat_interleave(8, 1)
    ll.merge(model)
    assert torch.allclose(layer.weight.detach() / codes.where(codes != 0, 1.0), (codes != 0) * own, atol=1e-12)


@pytest.mark.parametrize("name", ["hira", "deft"])
def test_dropout_keeps_the_frozen_layer_and_the_start(name: str) -> None:
    layer, x, _ = attached(name, dropout=0.5)
    layer.train()
    frozen = F.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), frozen)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    if name == "deft":
        layer.lora_dP.data.zero_()
    torch.manual_seed(1)
    mean = torch.stack([layer(x).detach() for _ in range(3000)]).mean(0)
    whole = layer.eval()(x).detach()
    assert not torch.allclose(layer.train()(x).detach(), whole, atol=1e-2)
    torch.testing.assert_close(mean, whole, rtol=0, atol=0.06 * float((whole - frozen).detach().abs().max()))


def test_deft_does_not_jump_with_the_signs_of_a_librarys_qr() -> None:
    """Which depend on the sign of P's first number."""
    layer, x, _ = attached("deft", decomposition="qr")
    nn.init.normal_(layer.lora_dP)
    nn.init.normal_(layer.lora_dR)
    outputs = []
    for first in (-1e-9, 1e-9):
        layer.lora_dP.data[0, 0] = first - layer.lora_P0[0, 0]
        outputs.append(layer(x).detach())
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)


def test_hira_of_a_scaled_embedding_follows_its_rows() -> None:
    table = nn.Embedding(24, 16).double()
    model = nn.Sequential(table)
    ll.attach(model, config("hira", target_names=("0",)))
    nn.init.normal_(table.lora_B)
    product = (table.lora_B @ table.lora_A).T.detach()
    ids = torch.randint(0, 24, (3, 5))
    torch.testing.assert_close(model(ids).detach(), (table.weight.detach() * (1 + product))[ids], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("hira", {"dropout": 1.0}, "HiRAConfig(dropout=1.0): dropout is a number from 0 to below 1"),
        ("peqa", {"group_size": 0}, "PEQAConfig(group_size=0): a group has at least 1 input; None is a whole row"),
        ("deft", {"decomposition": "lu"}, "DEFTConfig(decomposition='lu'): give one of relu, qr"),
        ("peanut", {"depth": -1}, "PEANuTConfig(depth=-1): give a number of encoders, from 0"),
        ("peanut", {"scale": 0}, "PEANuTConfig(scale=0): the scale is a number above 0"),
        ("peanut", {"scale": "1"}, "PEANuTConfig(scale='1'): scale is a finite number"),
        ("hira", {"dropout": "0.1"}, "HiRAConfig(dropout='0.1'): dropout is a number from 0 to below 1"),
        ("glora", {"weight": "full"}, "GLoRAConfig(weight='full'): give one of lora, vector, constant, none"),
        ("glora", {"prompt": "constant"}, "GLoRAConfig(prompt='constant'): give one of lora, vector, none"),
        ("glora", {"bias": "lora"}, "GLoRAConfig(bias='lora'): give one of vector, constant, none"),
    ],
)
def test_bad_configs(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ll.ConfigError) as caught:
        config(name, **fields)
    assert str(caught.value) == message


def test_more_bad_configs() -> None:
    with pytest.raises(ll.ConfigError, match=r"activation='prelu'\): give one of relu, gelu, gelu_tanh, leaky_relu"):
        config("peanut", activation="prelu")
    with pytest.raises(ll.ConfigError, match="weight, prompt and bias are all 'none', so that there is nothing to"):
        config("glora", weight="none", prompt="none", bias="none")


def test_what_does_not_fit() -> None:
    with pytest.raises(ll.TargetError, match=r"DEFTConfig\(r=17\) on a layer 24 → 16: r is at most 16"):
        attached("deft", r=17)
    with pytest.raises(
        ll.TargetError, match=r"group_size=5\) does not divide d_in=24; sizes that do: \[1, 2, 3, 4, 6, 8, 12, 24\]"
    ):
        attached("peqa", group_size=5)
    with pytest.raises(ll.TargetError, match="the layer has no bias, and GLoRAConfig"):
        attached("glora", biased=False, weight="none")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_learns(name: str) -> None:
    from lora_lite_bench.runs.run import Job, run

    lr = ll.get_variant(name).bench["lr"]
    losses = run(Job("shifted", {"batch_size": 64}, name, {}, seed=0, lr=lr, steps=30, whole=False)).losses
    assert sum(losses[-3:]) / 3 < 0.3 * losses[0], losses
