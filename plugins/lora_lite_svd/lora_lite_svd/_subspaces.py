"""Where AdaMSS starts: singular vectors of weight and bias, groups of their rows, directions of each group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lite_core import dense_weight, truncated_svd

ROUNDS = 10  # of k-means


def with_bias(layer: nn.Module) -> Tensor:
    """[W b] (d_out, d_in + 1), or W where the layer has no bias."""
    weight = dense_weight(layer)
    bias = getattr(layer, "bias", None)
    return weight if bias is None else torch.cat([weight, bias.detach().to(weight)[:, None]], 1)


def k_means(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The group of each row (n, d) from random rows on: numbers below `count`, not all of which need occur."""
    rows = rows.double().cpu()  # the same on every device
    count = min(count, len(rows))
    centers = rows[torch.randperm(len(rows), generator=generator)[:count]]
    for _ in range(ROUNDS):
        groups = torch.cdist(rows, centers).argmin(1)
        sizes = groups.bincount(minlength=count)[:, None]
        sums = torch.zeros_like(centers).index_add(0, groups, rows)
        centers = torch.where(sizes > 0, sums / sizes.clamp_min(1), centers)
    return torch.cdist(rows, centers).argmin(1)


def in_order(groups: Tensor) -> Tensor:
    """The same groups, numbered by their first rows."""
    first = {number: place for place, number in reversed([*enumerate(groups.tolist())])}
    numbers = {number: new for new, number in enumerate(sorted(first, key=lambda number: first[number]))}
    return torch.tensor([numbers[number] for number in groups.tolist()], device=groups.device)


def directions(rows: Tensor, r: int, threshold: float) -> Tensor:
    """The first right singular vectors of a group's rows (n, d), as (r, d); zeros where it has fewer."""
    made = rows.new_zeros(r, rows.shape[1])
    if most := min(r, len(rows)):
        _, S, Vh = truncated_svd(rows, most, torch.Generator())
        made[:most] = Vh.to(made) * (S.square() >= threshold * S[:1].square())[:, None]
    return made


def vectors(layer: nn.Module, dims: int) -> tuple[Tensor, Tensor]:
    """The first `dims` singular vectors of [W b]: U (d_out, dims), Vh (dims, d_in + 1), or (dims, d_in)."""
    U, _, Vh = truncated_svd(with_bias(layer), dims, torch.Generator().manual_seed(0))
    return U, Vh


def fill(params: dict[str, Tensor], cfg: Any, U: Tensor, Vh: Tensor, groups: Tensor) -> None:
    """Fill V and v, the group of each output, and A of all groups."""
    groups, d_in = in_order(groups).to(U.device), params["lora_V"].shape[1]
    parts = [U[groups == one] for one in range(len(params["lora_A"]) // cfg.r)]
    params["lora_A"].copy_(torch.cat([directions(part, cfg.r, cfg.threshold) for part in parts]))
    params["lora_c"].copy_(groups)
    params["lora_V"].copy_(Vh[:, :d_in])
    if "lora_v" in params:
        params["lora_v"].copy_(Vh[:, d_in])
