"""What can be read of a plugin without importing it: its source text."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..contract.errors import BrokenPlugin
from .listing import VariantInfo


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
                    fields |= _config_fields(read_source("lora_lite_core.contract.config"), name)
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and "ClassVar" not in ast.unparse(line.annotation):
                    value = ast.unparse(line.value) if line.value else "(required)"
                    fields[ast.unparse(line.target)] = value.replace("field(default_factory=dict)", "{}")
    return fields
