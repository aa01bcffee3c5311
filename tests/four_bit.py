"""bitsandbytes' 4-bit layers as on a processor with AVX512-BF16, which rearranges them at their first evaluation, or as
on one without it: `pytest --packing=on` or `off`, on any machine."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
from torch import Tensor


def force(packing: bool) -> None:
    """For all layers made from now on in this process. The kernel of such processors is done in torch."""
    bnb.nn.modules.has_avx512bf16 = lambda: packing
    native = bnb.functional.gemv_4bit

    def gemv_4bit(A: Tensor, B: Tensor, *args: Any, state: Any, **kwargs: Any) -> Tensor:
        if getattr(state, "packing_format_for_cpu", False):
            return packed_product(A, B, state)
        return native(A, B, *args, state=state, **kwargs)

    bnb.functional.gemv_4bit = gemv_4bit


def packed_product(x: Tensor, packed: Tensor, state: Any) -> Tensor:
    """x (..., in) times a rearranged weight: in bfloat16, as bitsandbytes' own kernel for AVX512-BF16 computes it."""
    state = copy.copy(state)
    scales = state.absmax.T.reshape(-1).float()
    state.original_nested = False  # the way back would quantise the scales again
    codes, state = bnb.functional._convert_weight_packed_for_cpu_inverse(packed.data, state)
    state.absmax, state.nested = scales, False
    weight = bnb.functional.dequantize_4bit(codes, state).bfloat16()
    return (x.bfloat16() @ weight.T).to(x.dtype)
