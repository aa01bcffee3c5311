"""Promises about other kinds of layer."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..attached.adapter import Adapter, adapters, attach
from ..contract.errors import CalibrationError, LoraLiteError
from ..layers.kinds.convolution import patches
from .check import promise
from .variant_under_test import Subject, close, must, weights_hash


class Experts(nn.Module):
    """Three linear layers d → h in one parameter; the rows of x (3, n, d) are theirs."""

    is_transposed = False

    def __init__(self, d: int, h: int) -> None:
        super().__init__()
        self.fused = nn.Parameter(torch.randn(3, h, d) / d**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([nn.functional.linear(rows, self.fused[index]) for index, rows in enumerate(x)])


class Separate(nn.Module):
    """The same with a layer for each."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        count, h, d = experts.fused.shape
        self.fused = nn.ModuleList(nn.Linear(d, h, bias=False) for _ in range(count))
        for layer, weight in zip(self.fused, experts.fused, strict=True):
            layer.weight.data = weight.detach().clone()  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(rows) for layer, rows in zip(self.fused, x, strict=True)])


@promise(
    "read the layer through dense_weight(layer) and base_forward(layer, x) alone, and widths as d_in and d_out; raise "
    "TargetError in param_specs for sizes that do not fit, or leave the kind out of LAYERS"
)
def check_convolutions(s: Subject) -> None:
    """On a convolution it computes what it does on a linear layer with the flat weight that gets the patches, or is
    refused without a trace."""
    d, h = s.sizes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        convolution = nn.Conv2d(d // 4, h, 2, stride=2, padding=1)
        images = torch.randn(4, d // 4, 9, 9)
    flat = nn.Linear(d, h)
    flat.weight.data, flat.bias.data = convolution.weight.detach().flatten(1), convolution.bias.detach().clone()  # type: ignore[union-attr]
    got = _moved(s, nn.Sequential(convolution), images)
    if got is not None:
        expected = _moved(s, nn.Sequential(flat), patches(convolution, images))
        assert expected is not None
        close(got.movedim(1, -1), expected, 1e-4, "the output of a convolution")


@promise(
    "write lowrank_delta(x, A, B) or project(x, A) for F.linear(x, A), which take token ids, and no x.dtype; or leave "
    '"embedding" out of LAYERS'
)
def check_embeddings(s: Subject) -> None:
    """On an embedding it computes what it does on a linear layer that gets rows of the identity, or is refused without
    a trace."""
    d, h = s.sizes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        table = nn.Embedding(d, h)
        ids = torch.randint(0, d, (4, 6))
    flat = nn.Linear(d, h, bias=False)
    flat.weight.data = table.weight.detach().T.contiguous()
    got = _moved(s, nn.Sequential(table), ids)
    if got is not None:
        expected = _moved(s, nn.Sequential(flat), nn.functional.one_hot(ids, d).float())
        assert expected is not None
        close(got, expected, 1e-4, "the output of an embedding")


@promise(
    "keep to what `layer` and `params` give: every expert comes as a layer of its own, without the others; or leave "
    '"experts" out of LAYERS'
)
def check_fused_experts(s: Subject) -> None:
    """On fused experts it computes what it does on a linear layer for each of them, or is refused without a trace."""
    d, h = s.sizes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        experts = Experts(d, h)
        x = torch.randn(3, 2 * d, d)
    separate = Separate(experts).train(not s.asks_for_training)
    got = _moved(s, experts, x)
    if got is None:
        return
    theirs = _attach(s, separate, x).layers()
    for name, target in adapters(experts)["default"].layers().items():
        for bare, stack in target.params.items():
            for number in range(0 if bare in target.shared else target.experts):
                theirs[f"{name}.{number}"].params[bare].data.copy_(stack[number].detach())
            if bare in target.shared:
                theirs[f"{name}.0"].params[bare].data.copy_(stack.detach())
    close(got, separate(x).detach(), 1e-4, "the output of fused experts")


def _moved(s: Subject, model: nn.Module, x: Tensor) -> Tensor | None:
    """The output with an adapter that is away from its start; None where the variant refuses the layer."""
    model.train(not s.asks_for_training)
    before, keys = weights_hash(model), list(model.state_dict())
    try:
        adapter = _attach(s, model, x)
    except LoraLiteError:
        must(list(model.state_dict()) == keys and not adapters(model), "the refusal leaves tensors behind")
        return None
    for parameter in adapter.parameters():
        draw = torch.randn(parameter.shape[-2:], generator=torch.Generator().manual_seed(parameter.numel()))
        parameter.data.add_(0.05 * draw)
    output: Tensor = model(x).detach()
    must(weights_hash(model) == before, "the weight has changed")
    return output


def _attach(s: Subject, model: nn.Module, x: Tensor) -> Adapter:
    cfg = replace(s.cfg, target_names=("0|fused",))
    try:
        return attach(model, cfg)
    except CalibrationError as error:
        if "embedding" in str(error):
            raise
        return attach(model, cfg, calibration_data=[x])
