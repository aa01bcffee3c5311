"""Trying a base layer: can it carry adapters at all?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layer_kinds import sizes_of
from .weight_reading import base_forward, probe


def misbehaviour(layer: nn.Module) -> str:
    """Why a frozen layer of an unusual class cannot carry adapters, as a clause, or "": a twin is tried on two rows."""
    draws = torch.randn(3, sizes_of(layer)[0], generator=torch.Generator().manual_seed(0))
    with probe(layer, bias=True) as (twin, zero):
        rows = draws.to(zero)
        rows[2] = rows[0] + rows[1]
        with torch.enable_grad():
            rows.requires_grad_()
            images: object = base_forward(twin, rows)
            if not isinstance(images, Tensor):
                return f"returns a {type(images).__name__}, not a tensor"
            if images.requires_grad:
                images.sum().backward(inputs=[rows])
            if rows.grad is None:
                return (
                    "passes no gradient to its input, so that adapters on it and before it would silently not be "
                    "trained (a weight-only quantisation, or bitsandbytes, does)"
                )
        rest = images[0] + images[1] - base_forward(twin, zero)[0] - images[2]
        return "" if rest.norm() <= 0.1 * images[2].norm() else "is not affine in its input"
