"""Which variants there are. Reads package metadata and source text only: importing torch or a plugin is left to
`get_variant`, so that listing is fast and survives a plugin that does not import."""

from __future__ import annotations

import fnmatch
import importlib
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from importlib_metadata import EntryPoint, entry_points
from importlib_metadata import version as core_version

from ..contract.errors import (
    AmbiguousVariant,
    BrokenPlugin,
    LoraLiteError,
    MissingPlugin,
    UnknownVariant,
    closest,
    listed,
)
from .listing import VariantInfo, VariantList
from .source import config_name, read_source, summary_of

if TYPE_CHECKING:
    from ..contract.config import AdapterConfig
    from ..contract.variant import Variant

GROUP = "lora_lite.variants"
# Only for the "pip install …" hint when a first-party package is missing.
FIRST_PARTY = {
    "lora": "lora-lite-lora",
    "antipasto": "lora-lite-svd",
    "eva": "lora-lite-svd",
    "lora_xs": "lora-lite-svd",
    "pissa": "lora-lite-svd",
    "ssvd": "lora-lite-svd",
    "delora": "lora-lite-ortho",
    "dora": "lora-lite-ortho",
    "hra": "lora-lite-ortho",
    "ia3": "lora-lite-ortho",
    "ia3_ff": "lora-lite-ortho",
    "oft": "lora-lite-ortho",
    "road": "lora-lite-ortho",
}

_ON_THE_CORE = re.compile(r"lora[-_.]+lite[-_.]+core(?![\w.-])", re.IGNORECASE)  # a requirement of the core

_registered: dict[str, Variant] = {}
_loaded: dict[str, Variant] = {}  # looked up once in a process, as Python does with modules


def list_variants(pattern: str | None = None, *, check: bool = False) -> VariantList:
    """The variants that entry points and `register` provide, sorted by name.

    pattern  a shell pattern on the name, as in list_variants("ia3*")
    check    import each one too, and report what fails; without it neither torch nor any plugin is imported
    """
    entries = _entry_points()
    infos = [_info(entry, entries) for entry in entries]
    infos += [_registered_info(variant) for variant in _registered.values()]
    infos = [info for info in infos if pattern is None or fnmatch.fnmatchcase(info.name, pattern)]
    if check:
        infos = [_checked(info) for info in infos]
    return VariantList(sorted(infos, key=lambda info: (info.name, info.distribution)))


def get_variant(name: str) -> Variant:
    """The checked variant of that name; imports its plugin.

    Raises UnknownVariant, MissingPlugin, BrokenPlugin or AmbiguousVariant.
    """
    if name in _registered:
        return _registered[name]
    if (known := _loaded.get(name)) is not None and not _blocked(name, known.distribution):
        return known
    entries = [entry for entry in _entry_points() if entry.name == name]
    if not entries:
        raise _unknown(name)
    allowed = [entry for entry in entries if not _blocked(name, _dist(entry)[0])]
    if not allowed:
        package = _dist(entries[0])[0]
        raise UnknownVariant(f"variant '{name}' of {package} is blocked by {_blocked(name, package)}")
    if len(allowed) > 1:
        raise AmbiguousVariant(_claimed_twice(name, allowed))
    from ..contract.variant import check_variant

    package, version = _dist(allowed[0])
    _check_core_range(name, allowed[0])
    try:
        module = importlib.import_module(allowed[0].value)
    except Exception as error:
        raise BrokenPlugin(
            f"variant '{name}' of {package} {version} cannot be imported: {type(error).__name__}: {error}\n"
            f"  its entry point says {allowed[0].value}; try: pip install --upgrade {package}"
        ) from error
    _loaded[name] = check_variant(name, module, package, version)
    return _loaded[name]


def register(namespace: Any, *, name: str) -> Variant:
    """Make a variant of any object that holds the contract's functions (a class with static methods, a module).

    For notebooks and tests: the name is gone with the process. A name registered before is replaced; a name that an
    installed package provides is refused with AmbiguousVariant. Raises BrokenPlugin as `get_variant` does.
    """
    from ..contract.variant import check_variant

    if owners := [_dist(entry)[0] for entry in _entry_points() if entry.name == name]:
        raise AmbiguousVariant(f"variant '{name}' is provided by {listed(owners)}; register yours under another name")
    _registered[name] = check_variant(name, namespace)
    return _registered[name]


def unregister(name: str) -> None:
    """Take back a `register`; UnknownVariant when there was none of that name."""
    from ..contract.variant import forget

    if name not in _registered:
        raise UnknownVariant(f"'{name}' was not registered by hand; registered: {listed(_registered)}")
    forget(_registered.pop(name).namespace)


def config_class(attribute: str) -> type[AdapterConfig]:
    """`PiSSAConfig` → the Config of 'pissa': `Config` and underscores dropped, case ignored."""
    wanted = _squash(attribute.removesuffix("Config"))
    names = sorted({entry.name for entry in _entry_points()} | set(_registered))
    found = [name for name in names if _squash(name) == wanted]
    if len(found) > 1:
        raise AmbiguousVariant(f"{attribute} could mean {listed(found)}; use get_variant(name).Config")
    if not found:
        first_party = next((name for name in FIRST_PARTY if _squash(name) == wanted), None)
        raise MissingPlugin(str(_unknown(first_party or attribute.removesuffix("Config").lower())))
    try:
        return get_variant(found[0]).Config
    except UnknownVariant as error:  # blocked: an attribute that is not there
        raise MissingPlugin(str(error)) from error


def LoraLiteConfig(*, variant: str, **fields: Any) -> AdapterConfig:
    """The typed config of a variant given by name: `LoraLiteConfig(variant="lora", r=8)`."""
    return get_variant(variant).Config(**fields)


def _squash(name: str) -> str:
    return name.replace("_", "").lower()


def _unknown(name: str) -> UnknownVariant:
    if name in FIRST_PARTY:
        return MissingPlugin(
            f"variant '{name}' is in a package that is not installed; type: pip install {FIRST_PARTY[name]}"
        )
    names = sorted({entry.name for entry in _entry_points()} | set(_registered))
    near = closest(name, [*names, *FIRST_PARTY])
    hint = f"; did you mean '{near[0]}'" if near else ""
    hint += "" if not near else "?" if near[0] in names else f", of {FIRST_PARTY[near[0]]}, which is not installed?"
    return UnknownVariant(
        f"no variant is called '{name}'{hint}\n  installed: {listed(names, 40)}\n"
        "  one of your own: pip install its package (pip install -e FOLDER), or ll.register(module, name=…)"
    )


def _entry_points() -> list[EntryPoint]:
    return list(entry_points(group=GROUP))


def _dist(entry: EntryPoint) -> tuple[str, str]:
    return (entry.dist.name, entry.dist.version) if entry.dist else ("", "")


def _check_core_range(name: str, entry: EntryPoint) -> None:
    """BrokenPlugin when the plugin's package asks for another version of the core than the one that runs."""
    from packaging.requirements import Requirement

    here = core_version("lora-lite-core")
    for text in (entry.dist.requires if entry.dist else None) or ():
        if not _ON_THE_CORE.match(text):
            continue
        requirement = Requirement(text)
        applies = requirement.marker is None or requirement.marker.evaluate()
        if applies and not requirement.specifier.contains(here, prereleases=True):
            package, version = _dist(entry)
            raise BrokenPlugin(
                f"variant '{name}' of {package} {version} needs lora-lite-core{requirement.specifier}, and {here} is "
                f"installed; type: pip install --upgrade lora-lite-core {package}"
            )


def _blocked(name: str, package: str) -> str:
    """The environment switch that keeps this variant out, or "". Both switches take variant and package names."""
    names = {name, package}
    for switch, keeps_out in (("LORA_LITE_BLOCK", True), ("LORA_LITE_PLUGINS", False)):
        value = os.environ.get(switch)
        if value is not None and bool(names & {part.strip() for part in value.split(",")}) is keeps_out:
            return f"{switch}={value}"
    return ""


def _claimed_twice(name: str, entries: Sequence[EntryPoint]) -> str:
    owners = [" ".join(_dist(entry)) for entry in entries]
    return (
        f"variant '{name}' is claimed by {' and by '.join(owners)}; "
        f"uninstall one of them, or set LORA_LITE_BLOCK={_dist(entries[-1])[0]}"
    )


def _info(entry: EntryPoint, entries: Sequence[EntryPoint]) -> VariantInfo:
    package, version = _dist(entry)
    summary, config, state, detail = "", "", "ok", ""
    try:
        tree = read_source(entry.value)
        summary, config = summary_of(tree), config_name(tree)
    except (OSError, SyntaxError, LoraLiteError) as error:
        state, detail = "broken", str(error)
    owners = [other for other in entries if other.name == entry.name and not _blocked(other.name, _dist(other)[0])]
    if switch := _blocked(entry.name, package):
        state, detail = "blocked", switch
    elif len(owners) > 1:
        state, detail = "claimed twice", _claimed_twice(entry.name, owners)
    return VariantInfo(entry.name, package, version, summary, state, detail, entry.value, config)


def _registered_info(variant: Variant) -> VariantInfo:
    doc = (variant.namespace.__doc__ or "").strip().partition("\n")[0]
    return VariantInfo(variant.name, "(registered)", "", doc, "ok", config=variant.Config.__name__)


def _checked(info: VariantInfo) -> VariantInfo:
    if info.state != "ok":
        return info
    try:
        get_variant(info.name)
    except LoraLiteError as error:
        return replace(info, state="broken", detail=str(error))
    return info
