"""A variant: its functions, resolved so that the hot path calls them directly, its config class and its constants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .config import AdapterConfig

HOOKS = (
    "param_specs", "init", "group_init", "forward_input", "forward", "before_step", "penalty", "fingerprint",
    "to_peft", "from_peft",
)  # fmt: skip


# Kinds of layer, of which a variant's LAYERS names some. A block is any module that returns what it gets in the same
# width, and only for those who ask for it.
KINDS = ("linear", "convolution", "embedding", "experts", "block")


class Hook:
    """One function of a variant and the arguments it names."""

    def __init__(self, function: Callable[..., Any], argnames: tuple[str, ...]) -> None:
        self.function = function
        self.argnames = argnames

    def __call__(self, available: Mapping[str, Any]) -> Any:
        return self.function(*[available[name] for name in self.argnames])


class Origin(NamedTuple):
    """Where a variant comes from, and the function that finds it again by its name."""

    by_name: Callable[[str], Variant]
    distribution: str = ""
    version: str = ""


class Variant:
    """A checked variant. Pickled by name, shared by copies: what sits on a layer holds no function of its own."""

    def __init__(self, name: str, namespace: Any, hooks: Mapping[str, Hook], origin: Origin) -> None:
        self.name = name
        self.namespace = namespace
        self.distribution = origin.distribution  # "" when registered by hand
        self.version = origin.version
        self._by_name = origin.by_name
        self.Config: type[AdapterConfig] = namespace.Config
        self.affine: bool = getattr(namespace, "AFFINE", True)
        self.identity_atol: float = getattr(namespace, "IDENTITY_ATOL", 0.0)
        self.identity_reason: str = getattr(namespace, "IDENTITY_REASON", "")
        self.bench: Mapping[str, float] = getattr(namespace, "BENCH", {})
        self.layers: tuple[str, ...] = tuple(getattr(namespace, "LAYERS", KINDS[:-1]))
        self.param_specs = hooks["param_specs"]
        self.init = hooks.get("init")
        self.group_init = hooks.get("group_init")
        self.forward_input = hooks.get("forward_input")
        self.forward = hooks.get("forward")
        self.before_step = hooks.get("before_step")
        self.penalty = hooks.get("penalty")
        self.fingerprint = hooks.get("fingerprint")
        self.to_peft = hooks.get("to_peft")
        self.from_peft = hooks.get("from_peft")

    @property
    def takes_calibration(self) -> bool:
        return self.group_init is not None and "calibration_data" in self.group_init.argnames

    def asks(self, argument: str) -> bool:
        """Whether forward or forward_input names this argument."""
        return any(argument in hook.argnames for hook in (self.forward, self.forward_input) if hook)

    def __deepcopy__(self, memo: dict[int, Any]) -> Variant:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return self._by_name, (self.name,)

    def __repr__(self) -> str:
        return f"<variant '{self.name}' from {self.distribution or 'll.register'}>"
