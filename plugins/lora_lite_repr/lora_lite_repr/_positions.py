"""The positions of a sequence that LoReFT and DiReFT change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def chosen(y: Tensor, first: int, last: int, context: Mapping[str, Any]) -> Tensor:
    """(batch or 1, length, 1) in y's dtype: 1 at the first and last positions of those that `attention_mask` marks, and
    none where the sequence's start is in a cache."""
    length, mask = y.shape[-2], context.get("attention_mask")
    if mask is None or mask.dim() != 2:
        mask = y.new_ones(1, length)
    if mask.shape[1] != length:
        return y.new_zeros(1, 1, 1)
    there = mask.ne(0)
    place = there.cumsum(1)
    there = there & ((place <= first) | (place > place[:, -1:] - last)) & (_cached(context) <= length)
    return there[..., None].to(y.dtype)


def _cached(context: Mapping[str, Any]) -> Any:
    """How many positions transformers' cache has by now, those of this call among them; 0 without one."""
    count = getattr(context.get("past_key_values"), "get_seq_length", None)
    return 0 if count is None else count()
