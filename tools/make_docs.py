"""Writes the pages of docs/ that are made from the code: methods.md and hooks.md. Run it after changing a docstring."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from pathlib import Path

import lora_lite_core as ll
from lora_lite_core import hookspecs
from lora_lite_core.contract import HOOKS
from lora_lite_core.spec import ParamSpec

DOCS = Path(__file__).parents[1] / "docs"
NOTE = "<!-- made by tools/make_docs.py from the docstrings; edit those -->\n"


def methods() -> str:
    """A section for every first-party variant: its text, and its config's own fields."""
    common = {field.name for field in fields(ll.AdapterConfig)}
    parts = [
        "# How each method works\n\n",
        NOTE,
        """
What `lora-lite inspect NAME` shows, for all. x is the layer's input, W and b its frozen weight and bias; the fields
that every config has (`target_names`, `exclude_names`, `target_roles`, `layers`, `dtype`) are left out.
""",
    ]
    for info in ll.list_variants():
        variant = ll.get_variant(info.name)
        text = inspect.getdoc(variant.namespace) or ""
        title, _, body = text.partition("\n")
        parts.append(f"\n## {info.name}\n\n**{title}** In `{info.distribution}`.\n\n")
        parts.append(f"```text\n{body.strip(chr(10))}\n```\n\n")
        own = [field for field in fields(variant.Config) if field.name not in common]
        defaults = [
            f"{field.name}={field.default if field.default is not MISSING else field.default_factory()!r}"  # type: ignore[misc]
            if not isinstance(field.default, str)
            else f"{field.name}={field.default!r}"
            for field in own
        ]
        parts.append(f"`{variant.Config.__name__}({', '.join(defaults)})`\n")
    return "".join(parts)


def hooks() -> str:
    """Every hook with its exact arguments, and ParamSpec."""
    parts = [
        "# The hooks\n\n",
        NOTE,
        f"\nContract version {ll.CONTRACT_VERSION}. A function names only the arguments it needs, in any order.\n",
    ]
    for name in HOOKS:
        function = getattr(hookspecs, name)
        parts.append(f"\n## {name}\n\n")
        parts.append(f"`{name}({', '.join(inspect.signature(function).parameters)})`\n\n")
        parts.append(f"{inspect.getdoc(function)}\n")
    parts.append(f"\n## ParamSpec\n\n```text\n{inspect.getdoc(ParamSpec)}\n```\n")
    return "".join(parts)


PAGES = {"methods.md": methods, "hooks.md": hooks}

if __name__ == "__main__":
    for page, make in PAGES.items():
        (DOCS / page).write_text(make(), encoding="utf-8")
