"""Multiplication by gates near one, for DoRA, IA3, IA3-FF and RoAd."""

from __future__ import annotations

import torch
from torch import Tensor


def gated(t: Tensor, gate: Tensor) -> Tensor:
    """gate ⊙ t in t's dtype, exactly t where the gate is 1; the gate, in at least float32, is broadcast to t."""
    if torch.finfo(t.dtype).bits < 32:  # which would round a gate near 1 to 1
        return torch.addcmul(t, t, (gate - 1).to(t.dtype))
    return t * gate
