"""A variant's functions, checked once against the contract and resolved, so that the hot path calls them directly."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pluggy import HookImpl, PluginManager, PluginValidationError

from . import hookspecs
from .config import AdapterConfig
from .errors import BrokenPlugin, LoraLiteError, did_you_mean, listed
from .text import is_variant_name, told

HOOKS = ("param_specs", "init", "group_init", "forward_input", "forward", "fingerprint", "to_peft", "from_peft")
_manager = PluginManager("lora_lite")
_manager.add_hookspecs(hookspecs)


class Hook:
    """One function of a variant and the arguments it names."""

    def __init__(self, impl: HookImpl) -> None:
        self.function: Callable[..., Any] = impl.function
        self.argnames: tuple[str, ...] = tuple(impl.argnames)

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
        self.param_specs = hooks["param_specs"]
        self.init = hooks.get("init")
        self.group_init = hooks.get("group_init")
        self.forward_input = hooks.get("forward_input")
        self.forward = hooks.get("forward")
        self.fingerprint = hooks.get("fingerprint")
        self.to_peft = hooks.get("to_peft")
        self.from_peft = hooks.get("from_peft")

    @property
    def takes_calibration(self) -> bool:
        return self.group_init is not None and "calibration_data" in self.group_init.argnames

    def __deepcopy__(self, memo: dict[int, Any]) -> Variant:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return self._by_name, (self.name,)

    def __repr__(self) -> str:
        return f"<variant '{self.name}' from {self.distribution or 'll.register'}>"


def check_variant(name: str, namespace: Any, origin: Origin) -> Variant:
    """The Variant of a module (or any object with the same attributes); BrokenPlugin when it breaks the contract."""
    label = f"variant '{name}' ({getattr(namespace, '__name__', None) or type(namespace).__name__})"
    if not is_variant_name(name):
        raise BrokenPlugin(f"{name!r} cannot be the name of a variant; use ASCII letters, digits, _ and -")
    try:
        _check_marked(label, namespace)
        _check_config(label, name, namespace)
        _check_constants(label, namespace)
        hooks = {key: Hook(impl) for key, impl in _implementations(label, name, namespace).items()}
    except LoraLiteError:
        raise
    except Exception as error:  # an attribute that cannot be read, and what else a module may do
        raise BrokenPlugin(f"{label} cannot be read: {told(error)}") from error
    if "param_specs" not in hooks or not ("forward" in hooks or "forward_input" in hooks):
        raise BrokenPlugin(
            f"{label} implements {listed(hooks)}; "
            "a variant needs param_specs and at least one of forward, forward_input"
        )
    return Variant(name, namespace, hooks, origin)


def forget(namespace: Any) -> None:
    """Make room for a namespace that is registered again (a notebook cell run twice)."""
    if (known_as := _known_as(namespace)) is not None:
        _manager.unregister(name=known_as)


def _known_as(namespace: Any) -> str | None:
    """The name it is registered under; by identity, where pluggy's get_name compares by value."""
    return next((name for name, plugin in _manager.list_name_plugin() if plugin is namespace), None)


def _implementations(label: str, name: str, namespace: Any) -> dict[str, HookImpl]:
    known_as = _known_as(namespace)
    if known_as not in (None, name):
        raise BrokenPlugin(f"{label} is already registered as '{known_as}'; one module is one variant, under one name")
    if _manager.get_plugin(name) is not None:
        _manager.unregister(name=name)
    try:
        _manager.register(namespace, name)
        found = {
            caller.name: impl
            for caller in _manager.get_hookcallers(namespace) or ()
            for impl in caller.get_hookimpls()
            if impl.plugin is namespace
        }
        for key, impl in found.items():
            if key not in HOOKS:
                raise BrokenPlugin(
                    f"{label}: no hook is called '{key}'{did_you_mean(key, HOOKS)}\n  hooks: {', '.join(HOOKS)}"
                )
            _check_signature(label, key, impl)
    except PluginValidationError as error:
        forget(namespace)
        raise BrokenPlugin(f"{label}: {_about_arguments(namespace, error)}") from error
    except BaseException:
        forget(namespace)
        raise
    return found


def _spec_arguments(hook: str) -> list[str]:
    return list(inspect.signature(getattr(hookspecs, hook)).parameters)


def _about_arguments(namespace: Any, error: PluginValidationError) -> str:
    """pluggy's own text names the offending arguments but not the ones to type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    hook = next((key for key in HOOKS if f"'{key}'" in lines[0] or f"hook {key!r}" in str(error)), "")
    if not hook:
        return "\n  ".join(lines)
    allowed = _spec_arguments(hook)
    given = inspect.signature(getattr(namespace, hook)).parameters
    hints = [f"{hook} has no argument '{name}'{did_you_mean(name, allowed)}" for name in given if name not in allowed]
    return "\n  ".join([*hints, *lines, f"arguments of {hook}: {', '.join(allowed)}"])


def _check_signature(label: str, hook: str, impl: HookImpl) -> None:
    """pluggy would silently never pass keyword-only, starred or defaulted parameters."""
    allowed = ", ".join(_spec_arguments(hook))
    for parameter in inspect.signature(impl.function).parameters.values():
        kind = {
            parameter.KEYWORD_ONLY: "keyword-only",
            parameter.VAR_POSITIONAL: "starred",
            parameter.VAR_KEYWORD: "starred",
        }
        if parameter.name == "self":
            raise BrokenPlugin(
                f"{label}: {hook} takes self; a variant's functions are plain ones, or @staticmethod in a class"
            )
        problem = kind.get(parameter.kind) or ("given a default" if parameter.default is not parameter.empty else "")
        if problem:
            raise BrokenPlugin(
                f"{label}: parameter '{parameter.name}' of {hook} is {problem} and would never be passed; "
                f"make it a plain parameter\n  arguments of {hook}: {allowed}"
            )
    if impl.hookwrapper or impl.wrapper:
        raise BrokenPlugin(
            f"{label}: {hook} is a hook wrapper; a variant's functions are called directly, write a plain one"
        )


def _check_marked(label: str, namespace: Any) -> None:
    for key in HOOKS:
        function = getattr(namespace, key, None)
        declared = vars(namespace).get(key)
        marked = hasattr(declared, "lora_lite_impl")
        if isinstance(declared, staticmethod) and marked and not hasattr(declared.__func__, "lora_lite_impl"):
            raise BrokenPlugin(f"{label}: {key} has @hookimpl above @staticmethod; write @staticmethod first, above it")
        if inspect.isroutine(function) and not hasattr(function, "lora_lite_impl"):
            raise BrokenPlugin(f"{label}: {key} has no @hookimpl above it and would be ignored; mark it, or rename it")


def _check_config(label: str, name: str, namespace: Any) -> None:
    config = getattr(namespace, "Config", None)
    if not (inspect.isclass(config) and issubclass(config, AdapterConfig)):
        raise BrokenPlugin(
            f"{label} has no Config; write a dataclass of AdapterConfig or LowRankConfig and `Config = ThatClass`"
        )
    if config.variant != name:
        raise BrokenPlugin(
            f"{label}: {config.__name__}.variant is {config.variant!r}; "
            f"write `variant = {name!r}`, as the entry point says"
        )
    declared = [key for key, kind in inspect.get_annotations(config).items() if "ClassVar" not in str(kind)]
    known = {f.name for f in dataclasses.fields(config)}
    if missing := [key for key in declared if key not in known]:
        raise BrokenPlugin(
            f"{label}: {config.__name__} declares {listed(missing)} without being a dataclass; "
            "put @dataclass(frozen=True, kw_only=True) above it"
        )


def _check_constants(label: str, namespace: Any) -> None:
    atol = getattr(namespace, "IDENTITY_ATOL", 0.0)
    if not isinstance(atol, (int, float)) or not atol >= 0:
        raise BrokenPlugin(f"{label}: IDENTITY_ATOL is {atol!r}; give a number from 0")
    if atol > 0 and not getattr(namespace, "IDENTITY_REASON", ""):
        raise BrokenPlugin(
            f"{label}: IDENTITY_ATOL = {atol} needs an IDENTITY_REASON, one sentence that says why not 0"
        )
    if not isinstance(getattr(namespace, "AFFINE", True), bool):
        raise BrokenPlugin(f"{label}: AFFINE is {namespace.AFFINE!r}; give True or False")
