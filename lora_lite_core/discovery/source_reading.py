"""What can be read of a plugin without importing it: its source text."""

from __future__ import annotations

import ast
import importlib.util
import warnings
from importlib.machinery import BYTECODE_SUFFIXES, EXTENSION_SUFFIXES
from pathlib import Path

from ..contract.errors import BrokenPlugin
from ..contract.text import plain
from ..contract.untrusted_input import collector_paused, read_regular

MOST = 128 * 1024  # bytes of a module: a hundred times what a variant has, and half a second for the parser at worst
BASES = {
    **dict.fromkeys(("AdapterConfig", "RankConfig", "LowRankConfig"), "lora_lite_core.contract.config"),
    "DropoutConfig": "lora_lite_core.toolbox.dropout",
}


def read_source(module: str) -> tuple[ast.Module, int]:
    """The syntax tree of a dotted module, found and read without importing anything, and its size in bytes.

    Raises BrokenPlugin when there is no source file, OSError when it cannot be read or is larger than MOST; and what
    Python's parser raises, be it RecursionError or MemoryError.
    """
    path = source_of(module)
    if path.suffix != ".py":  # compiled: there is nothing to read
        return ast.Module(body=[], type_ignores=[]), 0
    data = read_regular(path, MOST)
    with warnings.catch_warnings(), collector_paused():
        warnings.simplefilter("ignore")  # the parser's, about escapes: they would print lines of the source
        return ast.parse(data.decode("utf-8-sig"), filename=str(path)), len(data)


def summary_of(tree: ast.Module) -> str:
    """The first line of the docstring."""
    return plain((ast.get_docstring(tree) or "").partition("\n")[0])


def config_name(tree: ast.Module) -> str:
    """The class that `Config = …` names, or ""."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            return "Config"
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "Config" for t in node.targets):
            return plain(ast.unparse(node.value))
    return ""


def hook_names(tree: ast.Module) -> list[str]:
    """The functions that are marked `@hookimpl`."""
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [f.name for f in functions if any("hookimpl" in ast.unparse(d) for d in f.decorator_list)]


def config_fields(tree: ast.Module, config: str) -> dict[str, str]:
    """Field names and defaults as written, those of the core's base class first."""
    fields: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == config:
            for base in node.bases:
                name = ast.unparse(base).rpartition(".")[2]
                if name in BASES:
                    fields |= config_fields(read_source(BASES[name])[0], name)
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and "ClassVar" not in ast.unparse(line.annotation):
                    value = ast.unparse(line.value) if line.value else "(required)"
                    fields[ast.unparse(line.target)] = plain(value.replace("field(default_factory=dict)", "{}"))
    return fields


def source_of(module: str) -> Path:
    """The file of a dotted module, found without importing any of its packages."""
    top, *rest = module.split(".")
    found = importlib.util.find_spec(top)
    folders = [Path(p) for p in (found.submodule_search_locations or ())] if found else []
    if found and not rest and found.origin:
        return Path(found.origin)
    for folder in folders:
        base = folder.joinpath(*rest)
        for path in (base.with_name(base.name + ".py"), base / "__init__.py", *_compiled(base)):
            if path.is_file():
                return path
    raise BrokenPlugin(f"module {module} has no source file")


def _compiled(base: Path) -> list[Path]:
    return [base.with_name(base.name + suffix) for suffix in (*EXTENSION_SUFFIXES, *BYTECODE_SUFFIXES)]
