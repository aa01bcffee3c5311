"""QuanTA: the change is a chain of small matrices, each on two axes of the folded input, as gates on two qudits.

    y = W x + b + T x − S x,   T = T_K … T_2 T_1,   T_k on one pair of axes

x is seen as a tensor whose `axes` sizes have d_in as their product (d_out: those of y); there is a matrix for each pair
of axes, from the last two to the first two, named by their numbers from the end: lora_S12 and lora_dT12 are of the last
two. It acts on these two, flattened, alike for all places of the others; the first that touches an axis also takes it
from its size in x to that in y. The sizes are the largest first. S is the frozen start of T. T_k = S_k + dT_k, and only
the offsets dT_k are trained, from zero; T x − S x is added up from the terms dT_k …, each of which is zero at step 0.
The S_k are random, as LoRA's A. (The authors' code gives a layer with two widths the axes of the larger one, and fills
up with zeros.) Needs nothing of the base. The change can have full rank. Σ (in_m in_n)(out_m out_n) parameters and as
many frozen numbers: 3 · 2¹⁶ at d = 16³; about three times Σ d d_m d_n multiply-accumulates per token.

Chen, Dangovski, Loh, Dugan, Luo, Soljačić: QuanTA, 2024 (NeurIPS), arXiv:2406.00132.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from lora_lite_core import AdapterConfig, ConfigError, ParamSpec, hookimpl

from ._widths import factors

BENCH = {"lr": 8e-3}
LAYERS = ("linear", "convolution", "experts")


@dataclass(frozen=True, kw_only=True)
class QuanTAConfig(AdapterConfig):
    """Config of QuanTA.

    axes  into how many numbers the widths are split, from 2 to 32
    """

    variant = "quanta"

    axes: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.axes, int) or self.axes < 2:
            raise ConfigError(f"QuanTAConfig(axes={self.axes!r}): a whole number of at least 2")
        if self.axes > 32:
            raise ConfigError(f"QuanTAConfig(axes={self.axes!r}): at most 32; no width has more factors")


Config = QuanTAConfig


class _Gate(NamedTuple):
    """A matrix of the chain: its name, its axes counted from the end, and their sizes before and after."""

    name: str
    axes: tuple[int, int]
    before: tuple[int, int]
    after: tuple[int, int]

    def __call__(self, matrix: Tensor, X: Tensor) -> Tensor:
        pair = F.linear(X.movedim(self.axes, (-2, -1)).flatten(-2), matrix.to(X.dtype))
        return pair.unflatten(-1, self.after).movedim((-2, -1), self.axes)


def _gates(d_in: int, d_out: int, count: int) -> Iterator[_Gate]:
    sizes, goal = list(factors(d_in, count)), factors(d_out, count)
    for m, n in combinations(range(-1, -count - 1, -1), 2):
        yield _Gate(f"{-m}{-n}", (n, m), (sizes[n], sizes[m]), (goal[n], goal[m]))
        sizes[m], sizes[n] = goal[m], goal[n]


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: QuanTAConfig) -> dict[str, ParamSpec]:
    specs: dict[str, ParamSpec] = {}
    for gate in _gates(d_in, d_out, cfg.axes):
        (p, q), (u, v) = gate.before, gate.after
        specs[f"lora_S{gate.name}"] = ParamSpec((u * v, p * q), "kaiming_uniform", trainable=False, doc="frozen start")
        specs[f"lora_dT{gate.name}"] = ParamSpec((u * v, p * q), doc="offset from it")
    return specs


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: QuanTAConfig) -> Tensor:
    start, change = x.unflatten(-1, factors(x.shape[-1], cfg.axes)), None  # S x and T x − S x up to here
    for gate in _gates(x.shape[-1], y.shape[-1], cfg.axes):
        S, dT = params[f"lora_S{gate.name}"], params[f"lora_dT{gate.name}"]
        added = gate(dT, start)
        change = added if change is None else added + gate(S + dT, change)
        start = gate(S, start)
    assert change is not None
    return y + change.flatten(-cfg.axes).to(y.dtype)
