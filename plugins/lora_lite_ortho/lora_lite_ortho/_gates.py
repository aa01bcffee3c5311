"""Multiplication by gates near one, for DoRA, IA3, IA3-FF, LN-tuning, RED, RoAd and SSF."""

from __future__ import annotations

import torch
from torch import Tensor


def gated(t: Tensor, gate: Tensor) -> Tensor:
    """gate ⊙ t in t's dtype, exactly t where the gate is 1; the gate, in at least float32, is broadcast to t."""
    if torch.finfo(t.dtype).bits < 32:  # which would round a gate near 1 to 1
        return torch.addcmul(t, t, (gate - 1).to(t.dtype))
    return t * gate


def shifted(t: Tensor, offset: Tensor, shift: Tensor) -> Tensor:
    """(1 + offset) ⊙ t + shift in t's dtype, exactly t where both are 0; both in at least float32."""
    if torch.finfo(t.dtype).bits < 32:
        return torch.addcmul(t + shift.to(t.dtype), t, offset.to(t.dtype))
    return torch.addcmul(shift, t, 1 + offset)
