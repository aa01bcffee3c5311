"""Target: one adapter on one layer. Its only record: handed to `group_init`, kept on the layer, written to a file.

Fused experts are one target while they are on the model, and one for each expert where a variant looks at them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from .errors import BrokenPlugin, ModelStateError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from .variant import Variant


class Placing(Protocol):
    """What makes a target's tensors while its adapter is being put on."""

    def place_anew(self, target: Target, cfg: Any) -> None: ...
    def drop(self, target: Target) -> None: ...


class Shared(NamedTuple):
    """Where a tensor is that several layers share: its name in a file ("" when it is not saved), its attribute on the
    module that `attach` was given, and that module's parameters or buffers. These dicts are the module's own: a copy of
    one layer takes the shared tensors along, and nothing else."""

    key: str
    attribute: str
    held: dict[str, Any]


class Params(dict[str, "Tensor"]):
    """A target's tensors by bare name. They are changed in place: the names stand for what is on the layer."""

    def __setitem__(self, key: str, value: object) -> None:
        raise BrokenPlugin(f"target.params[{key!r}] = …: a tensor is not replaced but filled in place, with copy_()")


@dataclass(eq=False, repr=False)
class Target:
    """One layer as `group_init` sees it: name, layer, d_in, d_out, its own cfg, and params by bare name."""

    name: str  # the layer's dotted name
    layer: nn.Module
    d_in: int
    d_out: int
    cfg: Any  # of the variant's own class
    variant: Variant
    adapter: str  # the adapter's name
    kind: str = "linear"  # of layer: one of variant.KINDS
    part: str = ""  # of fused experts: the layer's parameter that holds them
    experts: int = 0  # and how many they are: the adapter's tensors have that many in front
    stack: Target | None = None  # of one expert, where a variant looks at it: the target that it is one of
    number: int = 0  # and which one
    storage: str = "dense"  # how the layer keeps its weight
    attributes: dict[str, str] = field(default_factory=dict)  # bare name → attribute, as lora_A → lora_A__style
    saved: tuple[str, ...] = ()  # the bare names that go into a file for this layer
    shared: dict[str, Shared] = field(default_factory=dict)  # bare name → a tensor that other layers have, too
    fingerprint: list[float] | None = None  # of the layer's weight, where the variant takes one
    base_version: int = -1  # torch's count of writes to the layer's weight when the adapter was put on
    ready: bool = True  # False from `attach` on the meta device until `initialize`
    strength: Any = None  # a tensor with one number, or one a row of the batch; None: the adapter as it is
    lasting_strength: Any = None  # the same outside of all with-blocks
    folded: bool = False  # True inside merged(): the layer's weight has the adapter in it
    placing: Placing | None = None  # while group_init runs
    calls: Any = None  # what the model is called with, for variants that ask for it
    seen: Params | None = None  # what `params` gives instead: those of one expert, or sharded tensors as whole ones

    @property
    def params(self) -> dict[str, Tensor]:
        """The adapter's tensors on this layer by bare name; to be filled in place."""
        return Params(self.params_on(self.layer))

    def params_on(self, layer: nn.Module) -> dict[str, Tensor]:
        """The same of a layer that may be a replica of this one; read anew at every call."""
        if self.seen is not None:
            return self.seen
        params = {bare: getattr(layer, attribute) for bare, attribute in self.attributes.items()}
        for bare, (_, attribute, held) in self.shared.items():
            params[bare] = held[attribute]
        return params

    def of_expert(self, params: Mapping[str, Tensor], index: int | Tensor) -> dict[str, Tensor]:
        """The tensors of one expert: slices of stacks, and those that layers share."""
        return {bare: tensor if bare in self.shared else tensor[index] for bare, tensor in params.items()}

    def reconfigure(self, **changes: Any) -> None:
        """Replace fields of this target's config (`reconfigure(r=5, alpha=10.0)`), make its tensors anew by
        `param_specs` and `init`, and refresh `params`. Raises ConfigError as the config does."""
        self._open().place_anew(self, replace(self.cfg, **changes))

    def drop(self) -> None:
        """Take the adapter off this layer."""
        self._open().drop(self)

    def _open(self) -> Placing:
        if self.placing is None:
            raise ModelStateError(f"target {self.name} can only be changed inside group_init, once until it is dropped")
        return self.placing

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: a copy is outside of the with-blocks that the original is in."""
        if self.folded:
            raise ModelStateError(
                "a copy made inside `with merged(model)` would hold the merged weights for good; leave that block first"
            )
        return {**vars(self), "strength": self.lasting_strength, "placing": None}

    def __repr__(self) -> str:
        return f"Target({self.name!r}, {self.d_in} → {self.d_out}, {self.cfg})"
