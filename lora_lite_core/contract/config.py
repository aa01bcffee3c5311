"""AdapterConfig, RankConfig and LowRankConfig: what configs share. Plain frozen dataclasses, JSON both ways."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from .errors import ConfigError, LoraLiteError, did_you_mean, wanted
from .text import told

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

FLOAT_DTYPES = ("float64", "float32", "bfloat16", "float16")
ROLES = ("reader", "writer", "inner")
# What other libraries call our fields: suggested when one of them is typed.
OTHER_NAMES = {
    "rank": "r",
    "lora_alpha": "alpha",
    "target_modules": "target_names",
    "exclude_modules": "exclude_names",
    "layers_to_transform": "layers",
    "modules_to_save": "train_modules",
    "use_rslora": "rslora",
}
_patterns_are_run: ContextVar[bool] = ContextVar("_patterns_are_run", default=True)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    r"""What every variant's config has.

    dtype          of the adapter tensors; None is float32 (float64 on a float64 layer). "bfloat16" or torch.bfloat16
    target_names   regular expressions (`re.search` on the full dotted name); () is every linear layer not excluded
    exclude_names  regular expressions; what `model.get_output_embeddings()` returns is left out too, except with ()
    target_roles   any of "reader", "writer", "inner" (by `model.config.hidden_size`); () is all
    layers         block numbers, counted in the outermost ModuleList of a name; None is all
    train_modules  regular expressions; these modules (a classifier) are trained and saved whole, and not adapted; a
                   pattern that matches no module names single parameters, as "bias$" for all biases

    Round trip: `LoraLiteConfig(**cfg.to_dict()) == cfg`. Raises ConfigError on an unknown field or a bad value.
    """

    variant: ClassVar[str] = ""

    dtype: str | torch.dtype | None = None
    target_names: tuple[str, ...] = ()
    exclude_names: tuple[str, ...] = ("lm_head", "embed_tokens")
    target_roles: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    train_modules: tuple[str, ...] = ()

    def __new__(cls, /, *args: Any, **given: Any) -> Self:
        # Here, because the generated __init__ would answer with a bare TypeError and no suggestion.
        known = [f.name for f in fields(cls)]
        if args:
            first = "r" if "r" in known else known[0]
            raise ConfigError(f"{cls.__name__} takes keyword arguments only, as in {cls.__name__}({first}=…)")
        for name in given:
            if name not in known:
                other = OTHER_NAMES.get(name)
                hint = f"; did you mean '{other}'?" if other in known else did_you_mean(name, known)
                raise ConfigError(f"{cls.__name__} has no field '{name}'{hint}\n  fields: {', '.join(known)}")
        own = ("r", "alpha", "dropout") if issubclass(cls, RankConfig) else ()  # of which it says more
        for f in fields(cls):
            if f.name in given and f.name not in own and (kind := wanted(f.type, given[f.name])):
                raise ConfigError(f"{cls.__name__}({f.name}={given[f.name]!r}): {f.name} is {kind}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for known in fields(self):  # JSON has lists alone
            if isinstance(known.default, tuple) and isinstance(value := getattr(self, known.name), list):
                self._set(known.name, tuple(value))
        for name in ("target_names", "exclude_names", "target_roles", "train_modules"):
            self._set(name, _strings(self, name))
        if self.dtype is not None:
            dtype = str(self.dtype).removeprefix("torch.")
            if dtype not in FLOAT_DTYPES:
                raise ConfigError(
                    f"{type(self).__name__}(dtype={self.dtype!r}) is not a dtype for adapter tensors"
                    f"{did_you_mean(dtype, FLOAT_DTYPES)}\n  dtypes: {', '.join(FLOAT_DTYPES)}, or None"
                )
            self._set("dtype", dtype)
        for pattern in (*self.target_names, *self.exclude_names, *self.train_modules):
            check_pattern(self, pattern)
        for role in self.target_roles:
            if role not in ROLES:
                raise ConfigError(f"no role is called '{role}'{did_you_mean(role, ROLES)}\n  roles: {', '.join(ROLES)}")
        if self.layers is not None:
            given: Any = [self.layers] if isinstance(self.layers, int) else self.layers
            layers = tuple(given) if isinstance(given, Iterable) else ()
            if not layers or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in layers):
                raise ConfigError(
                    f"{type(self).__name__}(layers={self.layers!r}): give block numbers from 0, or None for all"
                )
            self._set("layers", layers)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON types, with its variant's name under "variant"."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"variant": self.variant} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def for_target(self, name: str) -> Self:
        """The config of the target with this dotted name."""
        return self

    def patterns_per_target(self) -> tuple[str, ...]:
        """The patterns `for_target` tries; each must match a target."""
        return ()


@dataclass(frozen=True, kw_only=True)
class RankConfig(AdapterConfig):
    """A config with a rank.

    r             rank, at least 1
    rank_pattern  {regular expression: r} for some targets; the first that matches the dotted name wins
    """

    r: int = 8
    rank_pattern: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, ranks in (("r", [self.r]), ("rank_pattern", list(_mapping(self, "rank_pattern").values()))):
            if any(isinstance(r, bool) or not isinstance(r, int) or r < 1 for r in ranks):
                raise ConfigError(
                    f"{type(self).__name__}({name}={getattr(self, name)!r}): a rank is a whole number of at least 1"
                )
        for pattern in self.patterns_per_target():
            check_pattern(self, pattern)

    def for_target(self, name: str) -> Self:
        changes = {key: match for key, table in self._tables() if (match := _first(table, name)) is not None}
        return replace(self, **changes) if changes else self

    def patterns_per_target(self) -> tuple[str, ...]:
        return tuple(pattern for _, table in self._tables() for pattern in table)

    def _tables(self) -> tuple[tuple[str, Mapping[str, Any]], ...]:
        return (("r", self.rank_pattern),)


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(RankConfig):
    """A config with a rank and a scale.

    alpha          numerator of the scale alpha / r; None is r, so that the scale is 1
    alpha_pattern  {regular expression: alpha} for some targets; the first that matches the dotted name wins
    """

    alpha: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        alphas = [] if self.alpha is None else [self.alpha]
        for name, values in (("alpha", alphas), ("alpha_pattern", list(_mapping(self, "alpha_pattern").values()))):
            if any(isinstance(a, bool) or not isinstance(a, (int, float)) or not 0 < a < math.inf for a in values):
                raise ConfigError(
                    f"{type(self).__name__}({name}={getattr(self, name)!r}): alpha is a number above 0, or None for r"
                )
        super().__post_init__()

    @property
    def scale(self) -> float:
        """alpha / r, the factor of the low-rank product."""
        return 1.0 if self.alpha is None else self.alpha / self.r

    def _tables(self) -> tuple[tuple[str, Mapping[str, Any]], ...]:
        return (("r", self.rank_pattern), ("alpha", self.alpha_pattern))


def matches(pattern: str, name: str) -> bool:
    """Is the pattern found in the dotted name? ConfigError where it is no regular expression."""
    return _compiled(pattern).search(name) is not None


def _first(table: Mapping[str, Any], name: str) -> Any:
    """The value of the first pattern that matches the name, or None."""
    return next((value for pattern, value in table.items() if matches(pattern, name)), None)


def overrides(cfg: AdapterConfig, of: AdapterConfig) -> dict[str, Any]:
    """The fields in which a target's config `of` differs from the adapter's config, as plain JSON types."""
    base = cfg.to_dict()
    return {name: value for name, value in of.to_dict().items() if value != base[name]}


def check_pattern(cfg: AdapterConfig, pattern: str) -> None:
    if not _patterns_are_run.get():
        return
    try:
        _compiled(pattern)
    except ConfigError as error:
        raise ConfigError(f"{type(cfg).__name__}: {error}") from None


def config_from_file(Config: type[AdapterConfig], fields: Mapping[str, Any]) -> AdapterConfig:
    """The config that a file holds. Its patterns are text, not compiled: a file names its layers, and a pattern can be
    made to take for ever. ConfigError for whatever the class makes of fields that do not fit it."""
    return _quietly(Config.__name__, lambda: Config(**{key: fields[key] for key in fields if key != "variant"}))


def changed_by_file(cfg: AdapterConfig, changes: Mapping[str, Any]) -> AdapterConfig:
    """The config with a target's own fields, as `config_from_file` reads them."""
    return _quietly(type(cfg).__name__, lambda: replace(cfg, **changes)) if changes else cfg


def _quietly(name: str, make: Callable[[], AdapterConfig]) -> AdapterConfig:
    token = _patterns_are_run.set(False)
    try:
        return make()
    except LoraLiteError:
        raise
    except Exception as error:  # of a check that the variant's author has written
        raise ConfigError(f"{name}: {told(error)}") from error
    finally:
        _patterns_are_run.reset(token)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        raise ConfigError(f"{pattern!r} is not a regular expression: {error}") from None


def _strings(cfg: AdapterConfig, name: str) -> tuple[str, ...]:
    value = getattr(cfg, name)
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, (tuple, list)) or not all(isinstance(item, str) for item in values):
        raise ConfigError(f"{type(cfg).__name__}({name}={value!r}): give strings, as in {name}=('q_proj', 'v_proj')")
    return tuple(values)


def _mapping(cfg: AdapterConfig, name: str) -> Mapping[str, Any]:
    value = getattr(cfg, name)
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{type(cfg).__name__}({name}={value!r}): give a dict, as in {name}={{'q_proj': 16}}")
    return value
