"""Promises about other kinds of layer."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..attached.adapter import Adapter, attach
from ..contract.errors import CalibrationError, LoraLiteError
from ..layers.convolution import patches
from .check import promise
from .variant_under_test import Subject, close, must, weights_hash


@promise(
    "read the layer through dense_weight(layer) and base_forward(layer, x) alone, and widths as d_in and d_out; or "
    "raise TargetError in param_specs for sizes that do not fit"
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
    models = [nn.Sequential(layer).train(not s.asks_for_training) for layer in (convolution, flat)]
    data = [images, patches(convolution, images)]
    before = weights_hash(models[0])
    try:
        adapters = [_attach(s, model, x) for model, x in zip(models, data, strict=True)]
    except LoraLiteError:
        return
    for adapter in adapters:
        for number, parameter in enumerate(adapter.parameters()):
            draw = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.data.add_(0.05 * draw)
    got, expected = (model(x).detach() for model, x in zip(models, data, strict=True))
    close(got.movedim(1, -1), expected, 1e-4, "the output of a convolution")
    must(weights_hash(models[0]) == before, "the convolution's weight has changed")


def _attach(s: Subject, model: nn.Module, x: Tensor) -> Adapter:
    cfg = replace(s.cfg, target_names=("0",))
    try:
        return attach(model, cfg)
    except CalibrationError:
        return attach(model, cfg, calibration_data=[x])
