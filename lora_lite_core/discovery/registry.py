"""Which variants there are, and the checked variant of a name. Reads package metadata alone until one is asked for:
importing torch or a plugin is left to `get_variant`. The listing is in `listing`, which attach never imports."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from importlib_metadata import version as core_version

from ..contract.errors import (
    AmbiguousVariant,
    BrokenPlugin,
    MissingPlugin,
    UnknownVariant,
    closest,
    listed,
)
from ..contract.text import is_package_name, is_version, plain, told
from . import entry_points
from .entry_points import Entry, Package
from .name_conflicts import FIRST_PARTY, state_of, switched_off

if TYPE_CHECKING:
    from ..contract.config import AdapterConfig
    from ..contract.variant import Variant

GROUP = "lora_lite.variants"
_ON_THE_CORE = re.compile(r"lora[-_.]+lite[-_.]+core(?![\w.-])", re.IGNORECASE)  # a requirement of the core

_registered: dict[str, Variant] = {}
_loaded: dict[str, Variant] = {}  # looked up once in a process, as Python does with modules


def get_variant(name: str) -> Variant:
    """The checked variant of that name; imports its plugin.

    Raises UnknownVariant, MissingPlugin, BrokenPlugin or AmbiguousVariant.
    """
    if not isinstance(name, str):
        raise UnknownVariant(f"a variant's name is a string, not {name!r}")
    if name in _registered:
        return _registered[name]
    if (known := _loaded.get(name)) is not None and not switched_off(Entry(name, "", Package(known.distribution))):
        return known
    claims = [entry for entry in variant_entries() if entry.name == name]
    if not claims:
        raise _unknown(name)
    states = {entry: state_of(entry, claims) for entry in claims}
    usable = [entry for entry, (state, _) in states.items() if state == "ok"]
    if usable:
        return _imported(usable[0])
    for wanted, error in (("claimed twice", AmbiguousVariant), ("broken", BrokenPlugin), ("blocked", UnknownVariant)):
        for entry, (state, detail) in states.items():
            if state == wanted:
                about = f"variant '{name}' of {entry.package.name}"
                text = {"broken": f"{about} cannot be used: {detail}", "blocked": f"{about} is blocked by {detail}"}
                raise error(text.get(state, detail))
    raise _unknown(name)


def variant_of_file(path: object, name: str, plugin: Mapping[str, str]) -> Variant:
    """The variant that an adapter file names. MissingPlugin, where there is none here, says what to install: what the
    file says of its package is shown only if it is a name, and never for a variant that has a home."""
    try:
        return get_variant(name)
    except UnknownVariant as error:
        package, version = plugin.get("distribution", ""), plugin.get("version", "")
        about = f"{plain(path)} needs variant '{name}'"
        if any(entry.name == name for entry in variant_entries()):  # blocked
            text = f"{about}: {error}"
        elif name in FIRST_PARTY:
            text = f"{about} of {FIRST_PARTY[name]}; type: pip install {FIRST_PARTY[name]}"
        elif not package:
            text = f"{about}, which was registered by hand; register it first"
        elif is_package_name(package):
            of_version = f"{package} {version}" if is_version(version) else package
            text = f"{about} of {of_version}; type: pip install {package}"
        else:
            text = f"{about}, and the file names no valid package that provides it: {plain(repr(package), 100)}"
        raise MissingPlugin(text) from error


def register(namespace: Any, *, name: str = "") -> Variant:
    """Make a variant of any object that holds the contract's functions (a class with static methods, a module), or of
    the path of a module's file, which is run. Its name is what its config says (`Config.variant`) where none is given.

    For notebooks, files and tests: the name is gone with the process. A name registered before is replaced; a name that
    an installed package provides is refused with AmbiguousVariant. Raises BrokenPlugin as `get_variant` does.
    """
    from ..contract.variant import Origin
    from ..contract.variant_validation import check_variant

    if isinstance(namespace, (str, os.PathLike)):
        namespace = _run_file(Path(namespace))
    name = name or str(getattr(getattr(namespace, "Config", None), "variant", "") or "unnamed")
    claims = [entry for entry in variant_entries() if entry.name == name]
    if owners := [e.package.name for e in claims if state_of(e, claims)[0] in ("ok", "claimed twice")]:
        raise AmbiguousVariant(f"variant '{name}' is provided by {listed(owners)}; register yours under another name")
    _registered[name] = check_variant(name, namespace, Origin(get_variant))
    return _registered[name]


def _run_file(path: Path) -> Any:
    """The module of a file, in sys.modules so that its configs can be pickled; BrokenPlugin when it cannot be run."""
    spec = importlib.util.spec_from_file_location(f"lora_lite_file_{path.stem}", path)
    if path.suffix != ".py" or not path.is_file() or spec is None or spec.loader is None:
        raise BrokenPlugin(f"{plain(path)} is no file of a Python module; give the path of one, as in 'my_method.py'")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(spec.name)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        sys.modules.pop(spec.name) if before is None else sys.modules.update({spec.name: before})
        if isinstance(error, KeyboardInterrupt):
            raise
        raise BrokenPlugin(f"{plain(path)} cannot be run: {told(error)}") from error
    return module


def unregister(name: str) -> None:
    """Take back a `register`; UnknownVariant when there was none of that name."""
    from ..contract.variant_validation import forget

    if name not in _registered:
        raise UnknownVariant(f"'{name}' was not registered by hand; registered: {listed(_registered)}")
    forget(_registered.pop(name).namespace)


def registered() -> Mapping[str, Variant]:
    """The variants registered by hand."""
    return _registered


def config_class(attribute: str) -> type[AdapterConfig]:
    """`PiSSAConfig` → the Config of 'pissa': `Config` and underscores dropped, case ignored."""
    wanted = _squash(attribute.removesuffix("Config"))
    claims = [entry for entry in variant_entries() if _squash(entry.name) == wanted]
    usable = {entry.name for entry in claims if state_of(entry, claims)[0] in ("ok", "claimed twice")}
    found = sorted(usable | {name for name in _registered if _squash(name) == wanted})
    if len(found) > 1:
        raise AmbiguousVariant(f"{attribute} could mean {listed(found)}; use get_variant(name).Config")
    if not found and not claims:
        first_party = next((name for name in FIRST_PARTY if _squash(name) == wanted), None)
        raise MissingPlugin(str(_unknown(first_party or attribute.removesuffix("Config").lower())))
    try:
        return get_variant(found[0] if found else claims[0].name).Config
    except UnknownVariant as error:  # blocked: an attribute that is not there
        raise MissingPlugin(str(error)) from error


def LoraLiteConfig(*, variant: str, **fields: Any) -> AdapterConfig:
    """The typed config of a variant given by name: `LoraLiteConfig(variant="lora", r=8)`."""
    return get_variant(variant).Config(**fields)


def variant_entries() -> list[Entry]:
    """The entry points of variants, of all installed packages."""
    return entry_points.entries(GROUP)


def _squash(name: str) -> str:
    return name.replace("_", "").lower()


def _unknown(name: str) -> UnknownVariant:
    if name in FIRST_PARTY:
        return MissingPlugin(
            f"variant '{name}' is in a package that is not installed; type: pip install {FIRST_PARTY[name]}"
        )
    names = sorted({entry.name for entry in variant_entries() if not entry.problem} | set(_registered))
    near = closest(name, [*names, *FIRST_PARTY])
    hint = f"; did you mean '{near[0]}'" if near else ""
    hint += "" if not near else "?" if near[0] in names else f", of {FIRST_PARTY[near[0]]}, which is not installed?"
    return UnknownVariant(
        f"no variant is called '{name}'{hint}\n  installed: {listed(names, 40)}\n"
        "  one of your own: pip install its package (pip install -e FOLDER), or ll.register(module, name=…)"
    )


def _imported(entry: Entry) -> Variant:
    from ..contract.variant import Origin
    from ..contract.variant_validation import check_variant

    name, package, version = entry.name, entry.package.name, entry.package.version
    _check_core_range(entry)
    try:
        module = importlib.import_module(entry.value)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, too: a module that ends the program when it is imported
        raise BrokenPlugin(
            f"variant '{name}' of {package} {version} cannot be imported: {told(error)}\n"
            f"  its entry point says {entry.value}; try: pip install --upgrade {package}"
        ) from error
    _loaded[name] = check_variant(name, module, Origin(get_variant, package, version))
    return _loaded[name]


def _check_core_range(entry: Entry) -> None:
    """BrokenPlugin when the plugin's package asks for another version of the core than the one that runs."""
    from packaging.markers import UndefinedComparison, UndefinedEnvironmentName
    from packaging.requirements import InvalidRequirement, Requirement

    here = core_version("lora-lite-core")
    about = f"variant '{entry.name}' of {entry.package.name} {entry.package.version}"
    for text in entry.package.requires:
        if not _ON_THE_CORE.match(text):
            continue
        try:
            requirement = Requirement(text)
            applies = requirement.marker is None or requirement.marker.evaluate()
        except (InvalidRequirement, UndefinedComparison, UndefinedEnvironmentName) as error:
            raise BrokenPlugin(f"{about} asks for '{text}', which is no requirement: {error}") from error
        if applies and not requirement.specifier.contains(here, prereleases=True):
            raise BrokenPlugin(
                f"{about} needs lora-lite-core{requirement.specifier}, and {here} is "
                f"installed; type: pip install --upgrade lora-lite-core {entry.package.name}"
            )
