"""A module is checked once against the contract: what would be ignored or go wrong silently is a BrokenPlugin."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

from pluggy import HookImpl, PluginManager, PluginValidationError

from . import hookspecs
from .config import AdapterConfig
from .errors import BrokenPlugin, LoraLiteError, did_you_mean, listed
from .text import is_variant_name, told
from .variant import HOOKS, KINDS, Hook, Origin, Variant

_manager = PluginManager("lora_lite")
_manager.add_hookspecs(hookspecs)


def check_variant(name: str, namespace: Any, origin: Origin) -> Variant:
    """The Variant of a module (or any object with the same attributes); BrokenPlugin when it breaks the contract."""
    label = f"variant '{name}' ({getattr(namespace, '__name__', None) or type(namespace).__name__})"
    if not is_variant_name(name):
        raise BrokenPlugin(f"{name!r} cannot be the name of a variant; use ASCII letters, digits, _ and -")
    try:
        _check_marked(label, namespace)
        _check_config(label, name, namespace)
        _check_constants(label, namespace)
        found = _implementations(label, name, namespace)
        hooks = {key: Hook(impl.function, tuple(impl.argnames)) for key, impl in found.items()}
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
    bench = getattr(namespace, "BENCH", {})
    numbers = isinstance(bench, dict) and all(isinstance(v, (int, float)) and 0 < v < math.inf for v in bench.values())
    if not numbers or not bench.keys() <= {"lr", "steps"} or not isinstance(bench.get("steps", 1), int):
        raise BrokenPlugin(
            f"{label}: BENCH is {bench!r}; give a learning rate for AdamW, steps, or both, as in "
            'BENCH = {"lr": 5e-3, "steps": 200}'
        )
    if not isinstance(getattr(namespace, "AFFINE", True), bool):
        raise BrokenPlugin(f"{label}: AFFINE is {namespace.AFFINE!r}; give True or False")
    layers = getattr(namespace, "LAYERS", KINDS)
    if not isinstance(layers, (tuple, list)) or not layers or not set(layers) <= set(KINDS):
        raise BrokenPlugin(
            f"{label}: LAYERS is {layers!r}; give a tuple of the kinds of layer that it serves: "
            f"{', '.join(map(repr, KINDS))}"
        )
