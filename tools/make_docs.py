"""Writes the pages of docs/ that are made from the code. Run it after changing a docstring or a command."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from textwrap import indent

import click
from typeset import prose, typeset
from variant_facts import D_IN, D_OUT, TOKENS, table

import lora_lite_core as ll
from lora_lite_core.cli import main
from lora_lite_core.contract import hookspecs
from lora_lite_core.contract.variant import HOOKS
from lora_lite_core.discovery.name_conflicts import FIRST_PARTY
from lora_lite_core.testing.runner import CHECKS

DOCS = Path(__file__).parents[1] / "docs"
CONFIGS = (ll.AdapterConfig, ll.RankConfig, ll.LowRankConfig)
CODE = re.compile(r'^\s*"|\w\(\)\.|^ *for .* in .*:$', re.MULTILINE)  # blocks of a docstring that are no formulas
NOTE = "<!-- made by tools/make_docs.py from the code; edit that -->\n"


def page(title: str, *parts: str) -> str:
    return f"# {title}\n\n{NOTE}\n" + "\n".join(parts)


def text(body: str) -> str:
    return f"```text\n{body.strip(chr(10))}\n```\n"


def signature(name: str, function: object) -> str:
    """`name(a: int, *, b: str = "x") -> None`, annotations as they are written."""
    spelled = inspect.signature(function)  # type: ignore[arg-type]
    parameters = [
        parameter.replace(annotation=_Written(parameter.annotation))
        for parameter in spelled.parameters.values()
        if parameter.name != "self"
    ]
    return name + str(spelled.replace(parameters=parameters, return_annotation=_Written(spelled.return_annotation)))


class _Written(str):
    """An annotation that prints without quotation marks."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def described(name: str, thing: type) -> str:
    """A class: its text, then its public methods."""
    lines = [inspect.getdoc(thing) or ""]
    for attribute, member in vars(thing).items():
        if attribute.startswith("_") or not (inspect.isroutine(member) or isinstance(member, property)):
            continue
        head = (
            f".{attribute}" if isinstance(member, property) else signature(f".{attribute}", getattr(thing, attribute))
        )
        lines.append(f"\n{head}\n{indent(inspect.getdoc(member) or '', '    ')}")
    return f"### {name}\n\n{text(chr(10).join(lines))}"


def methods() -> str:
    """A section for every first-party variant: its text, and its config's own fields."""
    common = {field.name for field in fields(ll.AdapterConfig)}
    parts = [
        """What `lora-lite inspect NAME` shows, for all. x is the layer's input, W and b its frozen weight and bias; the
fields that every config has (`target_names`, `exclude_names`, `target_roles`, `layers`, `dtype`) are left out.
"""
    ]
    for info in ll.list_variants():
        variant = ll.get_variant(info.name)
        title, _, body = (inspect.getdoc(variant.namespace) or "").partition("\n")
        defaults = [
            f"{field.name}={(field.default if field.default is not MISSING else field.default_factory())!r}"  # type: ignore[misc]
            for field in fields(variant.Config)
            if field.name not in common
        ]
        parts += [
            f"## {info.name}\n\n**{title}** In `{info.distribution}`.\n",
            explained(body),
            f"`{variant.Config.__name__}({', '.join(defaults)})`\n",
        ]
    return page("How each method works", *parts)


def explained(body: str) -> str:
    """A docstring: blocks of formulas typeset, what stands between them as prose."""
    parts = re.split(r"((?:^ {4}.*\n)+)", body.strip("\n") + "\n", flags=re.M)
    return "\n".join(
        (text(part) if CODE.search(part) else typeset(part))
        if part.startswith("    ")
        else prose(part.strip("\n")) + "\n"
        for part in parts
        if part.strip()
    )


def hooks() -> str:
    """Every hook with its exact arguments, what the arguments are, and ParamSpec and the configs to start from."""
    parts = [f"Contract version {ll.CONTRACT_VERSION}. A function names only the arguments it needs, in any order.\n"]
    for name in HOOKS:
        function = getattr(hookspecs, name)
        arguments = ", ".join(inspect.signature(function).parameters)
        parts.append(f"## {name}\n\n`{name}({arguments})`\n\n{inspect.getdoc(function)}\n")
    arguments = (inspect.getdoc(hookspecs) or "").partition("in every hook that has them:\n")[2]
    arguments, _, constants = arguments.partition("Constants that a module may hold:\n")
    parts += ["## The arguments\n", text(arguments.rstrip()), "## Constants of the module\n", text(constants)]
    parts.append("## What a module builds on\n")
    parts += [described(thing.__name__, thing) for thing in (ll.ParamSpec, ll.Target, *CONFIGS)]
    return page("The hooks", *parts)


def checks() -> str:
    """Every check of the conformance kit."""
    parts = [
        """What `lora-lite check NAME` and `variant_checks` test, in this order. Each failure says which promise broke,
what was seen, and the way to keep it. Outputs are compared with those of the *frozen* model: freezing alone may make
torch take another kernel, the last digit apart.
"""
    ]
    parts += [f"## {check.name}\n\n{check.promise}\n\n*To keep it:* {check.mend}.\n" for check in CHECKS.values()]
    return page("The promises", *parts)


def commands() -> str:
    """The help of the command and of all its subcommands, those of installed packages too."""

    def helps(command: click.Command, name: str, parent: click.Context | None) -> Iterator[str]:
        context = click.Context(command, parent, name, terminal_width=100, **command.context_settings)
        yield f"## {context.command_path}\n"
        yield text(command.get_help(context))
        if isinstance(command, click.Group):
            for inner in command.list_commands(context):
                found = command.get_command(context, inner)
                assert found is not None
                yield from helps(found, inner, context)

    return page("The command line", *helps(main, "lora-lite", None))


def functions() -> str:
    """Every public name of `lora_lite` with its signature and text."""
    kinds: dict[str, list[str]] = {"Functions": [], "Classes": [], "Errors": []}
    for name in ll.__all__:
        thing = getattr(ll, name)
        if not callable(thing):
            continue
        is_class = inspect.isclass(thing)
        kind = "Errors" if is_class and issubclass(thing, Exception) else "Classes" if is_class else "Functions"
        if name == "hookimpl":
            body = "`@hookimpl` above a function of a variant's module marks it as one of the hooks."
            kinds[kind].append(f"### {name}\n\n{body}\n")
        elif is_class:
            kinds[kind].append(described(name, thing))
        else:
            body = f"{signature(name, thing)}\n\n{indent(inspect.getdoc(thing) or '', '    ')}"
            kinds[kind].append(f"### {name}\n\n{text(body)}")
    parts = ["What `import lora_lite as ll` gives; `ll.NAMEConfig` for every installed variant comes with these.\n"]
    for kind, entries in kinds.items():
        parts += [f"## {kind}\n", *entries]
    return page("Functions and classes", *parts)


def catalogue() -> str:
    """Every first-party variant in a row of a table that can be searched."""
    about = f"""All variants of this project's packages, measured on one linear layer {D_IN} → {D_OUT} with r = 8
where there is a rank and defaults else; methods of whole blocks on a block. *trained*: parameters, of the layer's own;
*work*: multiply-accumulates a token beyond the layer's own, in a batch of {TOKENS} tokens; *rank of the change*: what a
LoRA must have to be the same ("full": more than half of the layer's, merge it instead; `export_lora` measures it for
yours); *data*: attach needs `calibration_data`; *one base*: a file fits only the weights that it was made on; *PEFT*:
folders of the peft package are read or written; the last column is the package.
"""
    names = [info.name for info in ll.list_variants() if info.distribution in FIRST_PARTY.values()]
    return page("All variants", about, table(names))


PAGES = {
    "catalogue.md": catalogue,
    "methods.md": methods,
    "hooks.md": hooks,
    "promises.md": checks,
    "commands.md": commands,
    "reference.md": functions,
}

if __name__ == "__main__":
    made = {DOCS / name: make() for name, make in PAGES.items()}
    if "--check" in sys.argv:
        old = [path.name for path, content in made.items() if path.read_text(encoding="utf-8") != content]
        sys.exit(f"not current: {', '.join(old)}; type: just docs, or uv run python tools/make_docs.py" if old else 0)
    for path, content in made.items():
        path.write_text(content, encoding="utf-8")
