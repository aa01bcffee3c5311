"""Gates that are trained as offsets from one, for IA3, IA3-FF and RoAd."""

from __future__ import annotations

import torch
from torch import Tensor


def gated(t: Tensor, g: Tensor) -> Tensor:
    """(1 + g) ⊙ t in t's dtype, g broadcast over the leading dimensions; exactly t at g = 0."""
    if torch.finfo(t.dtype).bits < 32:  # where 1 + g would round small g away
        return torch.addcmul(t, t, g.to(t.dtype))
    return t * (1 + g.to(t.dtype))
