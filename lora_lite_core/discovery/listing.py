"""The listing of variants: its rows and its table, of what can be read without importing a plugin."""

from __future__ import annotations

import ast
import fnmatch
import html
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, overload

from ..contract.errors import BrokenPlugin, LoraLiteError
from ..contract.text import ROWS, paragraphs, plain, table, told
from .entry_points import Entry
from .name_conflicts import state_of
from .registry import get_variant, registered, variant_entries
from .source_reading import MOST, config_fields, config_name, hook_names, read_source, summary_of

if TYPE_CHECKING:
    from ..contract.variant import Variant

HEADS = ("variant", "package", "state", "summary")
OF_A_PACKAGE = 4 * MOST  # bytes of source that are read of one package's variants


@dataclass(frozen=True)
class VariantInfo:
    """One row of the listing. `state` is "ok", "broken", "blocked" or "claimed twice"; `detail` says why."""

    name: str
    distribution: str
    version: str
    summary: str
    state: str
    detail: str = ""
    module: str = ""
    config: str = ""


class VariantList(Sequence[VariantInfo]):
    """Variants, as a sequence of VariantInfo that prints as a table; `"pissa" in list_variants()` works too."""

    def __init__(self, items: Iterable[VariantInfo]) -> None:
        self._items = list(items)

    @overload
    def __getitem__(self, index: int) -> VariantInfo: ...
    @overload
    def __getitem__(self, index: slice) -> VariantList: ...
    def __getitem__(self, index: int | slice) -> VariantInfo | VariantList:
        return VariantList(self._items[index]) if isinstance(index, slice) else self._items[index]

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, item: object) -> bool:
        return any(item in (info, info.name) for info in self._items)

    def __repr__(self) -> str:
        if not self._items:
            return "no variants match; `lora-lite variants` lists all, `pip install lora-lite` brings the built-in ones"
        return "\n".join([table(HEADS, self._rows()), *self._details()])

    def _repr_html_(self) -> str:
        """The same table for notebooks."""
        if not self._items:
            return f"<p>{html.escape(repr(self))}</p>"
        head = "".join(f"<th style='text-align:left'>{name}</th>" for name in HEADS)
        rows = (
            "".join(f"<td style='text-align:left'>{html.escape(plain(cell))}</td>" for cell in row)
            for row in self._rows()[:ROWS]
        )
        body = "".join(f"<tr>{cells}</tr>" for cells in rows)
        notes = "".join(f"<p>{html.escape(detail)}</p>" for detail in self._details())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}"

    def _rows(self) -> list[tuple[str, str, str, str]]:
        return [(i.name, f"{i.distribution} {i.version}".strip(), i.state, i.summary) for i in self._items]

    def _details(self) -> list[str]:
        return [paragraphs(f"{plain(i.name)}: {i.detail}") for i in self._items[:ROWS] if i.detail]

    def to_dicts(self) -> list[dict[str, str]]:
        return [asdict(info) for info in self._items]


def list_variants(pattern: str | None = None, *, check: bool = False) -> VariantList:
    """The variants that entry points and `register` provide, sorted by name.

    pattern  a shell pattern on the name, as in list_variants("ia3*")
    check    import each one too, and report what fails; without it neither torch nor any plugin is imported
    """
    entries = variant_entries()
    read: dict[str, int] = {}
    infos = [_info(entry, entries, read) for entry in entries if _matches(entry.name, pattern)]
    infos += [_registered_info(variant) for name, variant in registered().items() if _matches(name, pattern)]
    if check:
        infos = [_checked(info) for info in infos]
    return VariantList(sorted(infos, key=lambda info: (info.name, info.distribution)))


def describe(info: VariantInfo) -> dict[str, Any]:
    """All that a variant's source says of it: its row, docstring, hooks, and its config's fields with defaults."""
    about: dict[str, Any] = {**asdict(info), "doc": "", "hooks": [], "fields": {}}
    if info.module and info.state != "broken":
        try:
            tree, _ = read_source(info.module)
            found = {"doc": ast.get_docstring(tree) or "", "hooks": hook_names(tree)}
            about |= found | {"fields": config_fields(tree, info.config)}
        except Exception as error:  # as in _info
            about["detail"] = about["detail"] or _why(error)
    return about


def _matches(name: str, pattern: str | None) -> bool:
    return pattern is None or fnmatch.fnmatchcase(name, pattern)


def _info(entry: Entry, entries: Sequence[Entry], read: dict[str, int]) -> VariantInfo:
    """A row, whatever is wrong with the plugin. `read` counts the bytes of source by package."""
    package = entry.package
    summary, config = "", ""
    state, detail = state_of(entry, entries)
    if not entry.problem:
        try:
            if read.setdefault(package.name, 0) > OF_A_PACKAGE:
                raise BrokenPlugin(f"not read: its package's variants have more than {OF_A_PACKAGE:,} bytes of source")
            tree, size = read_source(entry.value)
            read[package.name] += size
            summary, config = summary_of(tree), config_name(tree)
        except Exception as error:  # RecursionError and MemoryError of the parser, a finder that somebody has installed
            if state == "ok":
                state, detail = "broken", _why(error)
    return VariantInfo(
        plain(entry.name) or "(unknown)",
        plain(package.name),
        plain(package.version),
        summary,
        state,
        paragraphs(detail),
        plain(entry.value),
        config,
    )


def _why(error: Exception) -> str:
    """As the typed errors and the parser say it; the kind of error before what others say."""
    if isinstance(error, OSError):
        return str(error.strerror or error)
    return str(error) if isinstance(error, (LoraLiteError, SyntaxError)) else told(error)


def _registered_info(variant: Variant) -> VariantInfo:
    doc = str(variant.namespace.__doc__ or "").strip().partition("\n")[0]
    return VariantInfo(variant.name, "(registered)", "", plain(doc), "ok", config=variant.Config.__name__)


def _checked(info: VariantInfo) -> VariantInfo:
    if info.state != "ok":
        return info
    try:
        get_variant(info.name)
    except LoraLiteError as error:
        return replace(info, state="broken", detail=str(error))
    return info


def config_names(infos: Iterable[VariantInfo]) -> Iterator[str]:
    """The config classes of the listing, for `dir(lora_lite)`."""
    return (info.config for info in infos if info.state == "ok" and info.config.endswith("Config"))
