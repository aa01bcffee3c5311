"""Truncated singular value decompositions, and factors of a weight from which a low-rank product starts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..contract.errors import ConfigError
from ..layers.kinds.layer_kinds import is_conv1d
from ..layers.weight_reading import dense_weight

GRAM_LIMIT = 4096  # largest smaller side for which the float64 Gram route is taken


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


def start_factors(layer: nn.Module, A: Tensor, B: Tensor, scale: float, by: str) -> tuple[Tensor, Tensor]:
    """A0 (r, d_in) and B0 (d_out, r) that the peft package makes of the layer's weight when it opens a folder with A
    and B, and takes out of the weight: it then computes W + s (B A − B0 A0). The layer is not written.

    by "svd": s B0 A0 is the nearest matrix of rank r, each factor with the root of the singular values. by "qr": the
    first r columns of Q and rows of R; of a weight that is stored transposed, those of the stored one. r is that of A,
    and scale is s. Exact, of at least float32. Of each pair of signs that give the same product, the nearer one to A
    and B is taken. Raises ConfigError where scale is not above 0.
    """
    weight, r = dense_weight(layer), len(A)
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if not scale > 0:
        raise ConfigError(f"a scale of {scale:g}: the start is divided by its root")
    if by == "qr":
        stored = weight.T if is_conv1d(layer) else weight
        Q, R = torch.linalg.qr(stored)
        B0, A0 = (Q[:, :r], R[:r]) if stored is weight else (R[:r].T, Q[:, :r].T)
    else:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        root = (S[:r] / scale).sqrt()
        B0, A0 = U[:, :r] * root, root[:, None] * Vh[:r]
    if A.shape != A0.shape or B.shape != B0.shape:
        shapes = [tuple(one.shape) for one in (A, B, A0, B0)]
        raise ConfigError(f"A {shapes[0]} and B {shapes[1]} are not of the start's shapes, {shapes[2]} and {shapes[3]}")
    nearness = (A.to(A0) * A0).sum(1) + (B.to(B0) * B0).sum(0)
    signs = torch.where(nearness < 0, -1.0, 1.0).to(A0)
    return A0 * signs[:, None], B0 * signs


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
