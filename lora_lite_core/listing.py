"""The listing of variants: its rows, its table, and what can be read of a plugin without importing it."""

from __future__ import annotations

import ast
import html
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

from .errors import BrokenPlugin
from .text import table

HEADS = ("variant", "package", "state", "summary")


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
            "".join(f"<td style='text-align:left'>{html.escape(cell)}</td>" for cell in row) for row in self._rows()
        )
        body = "".join(f"<tr>{cells}</tr>" for cells in rows)
        notes = "".join(f"<p>{html.escape(detail)}</p>" for detail in self._details())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}"

    def _rows(self) -> list[tuple[str, str, str, str]]:
        return [(i.name, f"{i.distribution} {i.version}".strip(), i.state, i.summary) for i in self._items]

    def _details(self) -> list[str]:
        return [f"{i.name}: {i.detail}" for i in self._items if i.detail]

    def to_dicts(self) -> list[dict[str, str]]:
        return [asdict(info) for info in self._items]


def read_source(module: str) -> ast.Module:
    """The syntax tree of a dotted module, found and read without importing anything.

    Raises BrokenPlugin when there is no source file, OSError or SyntaxError when it cannot be read.
    """
    path = source_of(module)
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def summary_of(tree: ast.Module) -> str:
    """The first line of the docstring."""
    return (ast.get_docstring(tree) or "").partition("\n")[0]


def config_name(tree: ast.Module) -> str:
    """The class that `Config = …` names, or ""."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            return "Config"
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "Config" for t in node.targets):
            return ast.unparse(node.value)
    return ""


def source_of(module: str) -> Path:
    """The source file of a dotted module, found without importing any of its packages."""
    top, *rest = module.split(".")
    found = importlib.util.find_spec(top)
    folders = [Path(p) for p in (found.submodule_search_locations or ())] if found else []
    if found and not rest and found.origin:
        return Path(found.origin)
    for folder in folders:
        base = folder.joinpath(*rest)
        for path in (base.with_name(base.name + ".py"), base / "__init__.py"):
            if path.is_file():
                return path
    hint = "; an entry point names the module alone, without ':…'" if ":" in module else ""
    raise BrokenPlugin(f"module {module} has no source file{hint}")


def config_names(infos: Iterable[VariantInfo]) -> Iterator[str]:
    """The config classes of the listing, for `dir(lora_lite)`."""
    return (info.config for info in infos if info.state == "ok" and info.config.endswith("Config"))


def describe(info: VariantInfo) -> dict[str, Any]:
    """All that a variant's source says of it: its row, docstring, hooks, and its config's fields with defaults."""
    about: dict[str, Any] = {**asdict(info), "doc": "", "hooks": [], "fields": {}}
    if info.module and info.state != "broken":
        tree = read_source(info.module)
        about["doc"] = ast.get_docstring(tree) or ""
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        about["hooks"] = [f.name for f in functions if any("hookimpl" in ast.unparse(d) for d in f.decorator_list)]
        about["fields"] = _config_fields(tree, info.config)
    return about


def _config_fields(tree: ast.Module, config: str) -> dict[str, str]:
    """Field names and defaults as written, those of the core's base class first."""
    fields: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == config:
            for base in node.bases:
                name = ast.unparse(base).rpartition(".")[2]
                if name in ("AdapterConfig", "RankConfig", "LowRankConfig"):
                    fields |= _config_fields(read_source("lora_lite_core.config"), name)
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and "ClassVar" not in ast.unparse(line.annotation):
                    value = ast.unparse(line.value) if line.value else "(required)"
                    fields[ast.unparse(line.target)] = value.replace("field(default_factory=dict)", "{}")
    return fields
