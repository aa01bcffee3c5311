"""The basis that FRoD's layers share."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lora_lite_core import dense_weight


def category(name: str) -> str:
    """What layers of one kind have in common, as PEFT calls it: the last two parts of the name, without a number."""
    parts = name.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return re.sub(r"\W|_+", "_", parts[-1])
    kind = f"{parts[-2]}_{parts[-1]}"
    return "attention_output" if kind == "output_dense" and parts[-3:-2] == ["attention"] else re.sub(r"_+", "_", kind)


def positions(d: int) -> Callable[[Tensor, torch.Generator], None]:
    """Fills a tensor with random places off the diagonal of a (d, d) matrix, each once."""

    def draw(tensor: Tensor, generator: torch.Generator) -> None:
        place = torch.randperm(max(1, d * (d - 1)), generator=generator)[: tensor.numel()]
        row, column = place // max(1, d - 1), place % max(1, d - 1)
        tensor.copy_(row * d + column + (column >= row) * (d > 1))

    return draw


def inverse_norms(columns: Tensor) -> Tensor:
    """1 / ‖·‖ of each column, and 0 for one that is rounding noise."""
    norms = columns.norm(dim=0)
    return torch.where(norms > 1e-5 * norms.max(), 1 / norms, 0)


def basis_of(layers: Sequence[nn.Module], ridge: float) -> tuple[Tensor, Tensor]:
    """V and the transpose of its inverse, float64: V = Rᵀ E, where R is the triangle of the QR decomposition of the
    weights on top of each other, and E the eigenvectors of the mean of (Qᵢᵀ Qᵢ + ridge)⁻¹, Qᵢ the rows of layer i. With
    fewer rows than columns these are the right singular vectors, scaled so that Λ₀ is around 1 as it is else."""
    total = _gram(layers[0])
    for layer in layers[1:]:
        total = total + _gram(layer).to(total.device)
    R, failed = torch.linalg.cholesky_ex(total, upper=True)
    diagonal = R.diagonal()
    rows = sum(dense_weight(layer).shape[0] for layer in layers)
    if rows < len(R) or int(failed) or float(diagonal.min()) < 1e-6 * float(diagonal.max()):
        E, size = torch.linalg.eigh(total).eigenvectors.flip(-1), total.trace().div(rows).sqrt()
        return E * size, E / size
    identity = torch.eye(len(R), dtype=R.dtype, device=R.device)
    inverse = torch.linalg.solve_triangular(R, identity, upper=True)
    mean = torch.zeros_like(R)
    for layer in layers:
        mean += torch.linalg.inv(inverse.T @ _gram(layer).to(R.device) @ inverse + ridge * identity) / len(layers)
    E = torch.linalg.eigh(mean).eigenvectors
    return R.T @ E, inverse @ E


def _gram(layer: nn.Module) -> Tensor:
    weight = dense_weight(layer).double()
    return weight.T @ weight
