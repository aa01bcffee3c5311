"""Block rotations, and Cayley's transform as a truncated Neumann series, for OFT and BOFT."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_lite_core import ConfigError, cayley_offset, skew


def check_terms(name: str, terms: object) -> None:
    if terms is not None and (not isinstance(terms, int) or isinstance(terms, bool) or terms < 2):
        raise ConfigError(f"{name}(terms={terms!r}): a series that turns has at least 2 terms; None turns exactly")
    if terms is not None and terms > 100:
        raise ConfigError(f"{name}(terms={terms!r}): at most 100, added one after the other; None turns exactly")


def rotation_offset(q: Tensor, b: int, terms: int | None) -> Tensor:
    """Rᵢ − I (n, b, b) from upper triangles q (n, b(b−1)/2) of Q: exactly, or as a truncated series."""
    Q = skew(q, b)
    return cayley_offset(Q) if terms is None else series_offset(Q, terms)


def offset_of(q: Tensor, b: int, terms: int | None, full: torch.dtype) -> Tensor:
    """The same of a parameter that is in another dtype."""
    return rotation_offset(q.to(full), b, terms)


def series_offset(Q: Tensor, terms: int) -> Tensor:
    """R − I of R = I + 2 Q + 2 Q² + … + 2 Qᵖ⁻¹ + Qᵖ, p = terms − 1 but at least 3, for skew-symmetric Q (..., b, b);
    with 2 terms R = I + 2 Q. Exactly zero at Q = 0."""
    if terms == 2:
        return 2 * Q
    twice = 2 * torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    total = Q
    for _ in range(max(3, terms - 1) - 1):
        total = Q @ (total + twice)
    return total


def bounded(q: Tensor, eps: float) -> Tensor:
    """Upper triangles q (n, …) of skew-symmetric blocks, those scaled down whose Frobenius norm is above eps / √n."""
    limit, norm = eps / len(q) ** 0.5, 2**0.5 * torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    return q * (limit / norm.clamp_min(limit))


def turned(blocks: Tensor, offset: Tensor) -> Tensor:
    """Rᵢ blocksᵢ for blocks (..., n, b), of Rᵢ − I (n, b, b) or (1, b, b); exactly the blocks where that is 0."""
    R = offset.to(blocks.dtype)
    if full := torch.finfo(blocks.dtype).bits >= 32:  # in less, I + … would round the offset away
        R = R + torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    made = F.linear(blocks, R[0]) if len(R) == 1 else torch.einsum("...nb,nab->...na", blocks, R)
    return made if full else made.add_(blocks)
