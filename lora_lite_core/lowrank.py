"""The low-rank arithmetic that several plugin packages share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

GRAM_LIMIT = 4096  # largest smaller side for which the float64 Gram route is taken


def lowrank_delta(x: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """scale · B(A x): x (..., d_in), A (r, d_in), B (d_out, r) → (..., d_out) in x's dtype, or autocast's.

    The factors are cast to x's dtype for the two matmuls; gradients reach them in their own. The result is a tensor of
    its own: `.add_(y)` makes y + delta of it without the memory of a third.
    """
    hidden = F.linear(x, A.to(x.dtype))
    if scale != 1.0:
        hidden = hidden * scale
    return F.linear(hidden, B.to(hidden.dtype))


def truncated_svd(
    weight: Tensor, r: int, generator: torch.Generator, *, smallest: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """U (d_out, r), S (r,), Vh (r, d_in) of the r largest singular triplets, or the r smallest, largest first.

    Smaller side up to 4096: eigenvectors of the float64 Gram matrix, exact to about 1e-8 of the largest singular
    value and a few times faster than a full SVD. Beyond: a randomised SVD with oversampling (q = 2r, 8 power
    iterations, seeded by `generator`) where r is at most 1/16 of the smaller side, else a full SVD. Signs are fixed so
    that the largest entry of each column of U is positive. The result has the weight's dtype, at least float32.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    small = min(weight.shape)
    if r > small:
        raise ValueError(f"r={r} is more than the {small} singular values of a {tuple(weight.shape)} weight")
    if small <= GRAM_LIMIT:
        U, S, Vh = _by_gram(weight.double(), r, smallest)
    elif r <= small // 16 and not smallest:
        U, S, Vh = _randomised(weight.to(dtype), r, generator)
    else:
        U, S, Vh = torch.linalg.svd(weight.to(dtype), full_matrices=False)
        kept = slice(small - r, small) if smallest else slice(r)
        U, S, Vh = U[:, kept], S[kept], Vh[kept]
    largest = U.gather(0, U.abs().argmax(0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(U)
    return (U * signs).to(dtype), S.to(dtype), (Vh * signs.T).to(dtype)


def _by_gram(weight: Tensor, r: int, smallest: bool) -> tuple[Tensor, Tensor, Tensor]:
    tall = weight.shape[0] > weight.shape[1]
    W = weight.T if tall else weight
    vectors = torch.linalg.eigh(W @ W.T).eigenvectors  # of ascending eigenvalues
    U = vectors[:, :r].flip(-1) if smallest else vectors[:, -r:].flip(-1)
    image = U.T @ W
    S = image.norm(dim=-1)  # more accurate than the root of an eigenvalue
    # Directions by QR, not by division: orthonormal also where singular values vanish.
    Q, R = torch.linalg.qr(image.T)
    Vh = (Q * torch.where(R.diagonal() < 0, -1.0, 1.0)).T
    return (Vh.T, S, U.T) if tall else (U, S, Vh)


def _randomised(weight: Tensor, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    # Drawn on the CPU: the same on every device.
    draws = torch.randn(weight.shape[1], 2 * r, generator=generator, dtype=torch.float32, device="cpu")
    Q = torch.linalg.qr(weight @ draws.to(weight)).Q
    for _ in range(8):
        Q = torch.linalg.qr(weight.T @ Q).Q
        Q = torch.linalg.qr(weight @ Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ weight, full_matrices=False)
    return (Q @ U)[:, :r], S[:r], Vh[:r]


def skew(entries: Tensor, b: int) -> Tensor:
    """Skew-symmetric (..., b, b) matrices from their strict upper triangles (..., b(b−1)/2), row by row."""
    rows, columns = torch.triu_indices(b, b, 1, device=entries.device)
    flat = entries.new_zeros(*entries.shape[:-1], b * b)
    upper = flat.index_copy(-1, rows * b + columns, entries).unflatten(-1, (b, b))
    return upper - upper.mT


def cayley_offset(X: Tensor) -> Tensor:
    """R − I of the rotation R = (I − X)⁻¹ (I + X), for skew-symmetric X (..., b, b); exactly zero at X = 0.

    Closed forms for b = 2 and, by its characteristic polynomial X⁴ + s X² + p² I = 0, for b = 4 (s: sum of the squared
    upper entries, p: Pfaffian); a batched inverse otherwise. Give it at least float32.
    """
    b = X.shape[-1]
    if b == 2:
        t = X[..., 0, 1, None, None]
        return 2 * (X - t * t * torch.eye(2, dtype=X.dtype, device=X.device)) / (1 + t * t)
    if b == 4:
        s = (X * X).sum((-2, -1), keepdim=True) / 2
        p = X[..., 0, 1] * X[..., 2, 3] - X[..., 0, 2] * X[..., 1, 3] + X[..., 0, 3] * X[..., 1, 2]
        p2 = (p * p)[..., None, None]
        X2 = X @ X
        identity = torch.eye(4, dtype=X.dtype, device=X.device)
        return 2 * (X @ X2 + X2 + (1 + s) * X - p2 * identity) / (1 + s + p2)
    identity = torch.eye(b, dtype=X.dtype, device=X.device)
    # R = 2 (I − X)⁻¹ − I. The singular values of I − X are at least 1: its inverse loses nothing and needs no check.
    return 2 * (torch.linalg.inv_ex(identity - X).inverse - identity)
