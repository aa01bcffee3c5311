"""ParamSpec: the declaration of one adapter tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

from .errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Init = Union[str, Callable[[Tensor, torch.Generator], object]]  # noqa: UP007 (evaluated by type checkers only)


def _zeros(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.zero_()


def _ones(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.fill_(1)


def _kaiming_uniform(tensor: Tensor, generator: torch.Generator) -> None:
    bound = 1 / math.sqrt(tensor.shape[-1])  # kaiming_uniform_(a=√5) of a (r, d_in) tensor: U(±1/√d_in)
    tensor.uniform_(-bound, bound, generator=generator)


NAMED_INITS: dict[str, Callable[[Tensor, torch.Generator], object]] = {
    "zeros": _zeros,
    "ones": _ones,
    "kaiming_uniform": _kaiming_uniform,
}


@dataclass(frozen=True)
class ParamSpec:
    """One adapter tensor of one layer.

    shape       at least one dimension (FSDP2 refuses scalars: write `(1,)`), every size at least 1
    init        "zeros", "ones", "kaiming_uniform" (U(±1/√last dimension)), or `f(tensor, generator)`, which fills a
                CPU tensor in place (float32, or the spec's own integer dtype) from a CPU generator
    trainable   None means `not as_buffer`; a False here makes a frozen `nn.Parameter`, right for large frozen tensors
    as_buffer   a buffer instead of a parameter: for small statistics
    persistent  False: not saved, recomputed by `init` at load; only for continuous functions of the frozen weight
    dtype       None takes the config's dtype; an integer dtype is never cast
    doc         one line for people
    shared      a key, as "A": one tensor for all layers whose spec has this key and this shape. It is a plain parameter
                (or buffer) of the module that `attach` was given, saved once, seeded by key and shape. `init` may read
                it and not fill it, `group_init` may

    Raises ConfigError when these contradict each other.
    """

    shape: tuple[int, ...]
    init: Init = "zeros"
    trainable: bool | None = None
    as_buffer: bool = False
    persistent: bool = True
    dtype: torch.dtype | None = None
    doc: str = ""
    shared: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.shape, (tuple, list)):
            raise ConfigError(f"ParamSpec({self.shape!r}): the shape is a tuple, as in ParamSpec((8,))")
        object.__setattr__(self, "shape", tuple(self.shape))
        if self.trainable is None:
            object.__setattr__(self, "trainable", not self.as_buffer)
        if not self.shape:
            raise ConfigError("ParamSpec(shape=()): a 0-dimensional tensor cannot be sharded; use shape=(1,)")
        if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in self.shape):
            raise ConfigError(f"ParamSpec(shape={self.shape}): every size must be a whole number of at least 1")
        if isinstance(self.init, str) and self.init not in NAMED_INITS:
            hint = did_you_mean(self.init, NAMED_INITS)
            raise ConfigError(
                f"ParamSpec(init={self.init!r}) is not a named init{hint}\n"
                f"  named inits: {', '.join(NAMED_INITS)}; or give a function f(tensor, generator)"
            )
        if self.trainable and self.as_buffer:
            raise ConfigError(
                "ParamSpec(trainable=True, as_buffer=True): a buffer cannot be trained; drop one of the two"
            )
        if self.trainable and not self.persistent:
            raise ConfigError("ParamSpec(trainable=True, persistent=False): what is trained must be saved")
        if not self.persistent and self.dtype is not None and not self.dtype.is_floating_point:
            raise ConfigError(
                f"ParamSpec(persistent=False, dtype={self.dtype}): what is computed anew at load may come out another "
                "way; save it"
            )
        if self.shared and (not self.shared.isidentifier() or "__" in self.shared or self.shared.startswith("lora_")):
            raise ConfigError(
                f"ParamSpec(shared={self.shared!r}): the key becomes a part of a name, lora_KEY_SHAPE; use letters, "
                "digits and single underscores, as in shared='A'"
            )
        if self.trainable and self.dtype is not None and not self.dtype.is_floating_point:
            raise ConfigError(
                f"ParamSpec(trainable=True, dtype={self.dtype}): only floating-point tensors can be trained"
            )

    def fill(self, tensor: Tensor, generator: torch.Generator) -> None:
        """Run the init on a CPU tensor."""
        fill = NAMED_INITS[self.init] if isinstance(self.init, str) else self.init
        result = fill(tensor, generator)
        if result is not None and result is not tensor:
            raise ConfigError(
                "init returned a new object instead of filling its tensor; write in place, as t.normal_()"
            )
