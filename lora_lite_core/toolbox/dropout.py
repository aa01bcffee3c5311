"""Dropout of what an adapter reads, for variants that offer it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from ..contract.config import LowRankConfig
from ..contract.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DropoutConfig(LowRankConfig):
    """A config with a rank, a scale and dropout.

    dropout  share of the adapter's input that is set to zero in training mode, from 0 to below 1; 0 is none. The frozen
             layer always gets all of its input
    """

    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.dropout, (int, float)) and not isinstance(self.dropout, bool)
        if not number or not 0 <= self.dropout < 1:
            raise ConfigError(f"{type(self).__name__}(dropout={self.dropout!r}): dropout is a number from 0 to below 1")


def dropped(x: Tensor, cfg: DropoutConfig, training: bool) -> Tensor:
    """In training mode x with a share of its entries set to zero and the others grown to make up for it, else x itself.
    Token ids, what the adapter of an embedding reads, are left as they are, as in the peft package.
    Draws from torch's global generator, so that activation checkpointing repeats the draw.

    Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov: Dropout, 2014 (JMLR 15).
    """
    return F.dropout(x, cfg.dropout) if training and cfg.dropout and x.is_floating_point() else x
