"""`lora-lite new`: a complete package with a working variant, from the templates of this wheel."""

from __future__ import annotations

import datetime
import keyword
import re
import string
import tempfile
from importlib.resources import files
from pathlib import Path

from importlib_metadata import version

from ..contract.config import RankConfig
from ..contract.errors import ConfigError
from ..contract.text import plain
from ..discovery.listing import list_variants
from ..discovery.name_conflicts import FIRST_PARTY
from ..discovery.registry import get_variant

# Template: where it goes.
FILES = {
    "pyproject.toml.txt": "pyproject.toml",
    "module.py.txt": "$module/__init__.py",
    "test.py.txt": "tests/test_$variant.py",
    "README.md.txt": "README.md",
    "LICENSE.txt": "LICENSE",
    "gitignore.txt": ".gitignore",
    "ci.yml.txt": ".github/workflows/test.yml",
}


def new_package(name: str, parent: Path, author: str, like: str | None = None) -> Path:
    """Write the package lora-lite-NAME into a new folder under `parent`, and return that folder.

    name    of the variant: "my-variant" becomes variant my_variant, module lora_lite_my_variant and MyVariantConfig;
            capitals are kept where they belong: "SHiRA" is variant shira and SHiRAConfig
    author  for pyproject.toml, licence and citation
    like    a variant of this project whose module is copied, with the helpers beside it, instead of the template

    Either all files are written or none. Raises ConfigError for a name that cannot be used or is taken and for a `like`
    that is not one of this project's, MissingPlugin when that one is not installed, FileExistsError when the folder is
    there already.
    """
    given = re.sub(r"^lora[-_]lite[-_]", "", name)
    variant = given.lower().replace("-", "_")
    spelled = given if given != given.lower() else given.replace("_", "-").title()
    if keyword.iskeyword(variant):
        raise ConfigError(f"{name!r} cannot be the name of a variant: '{variant}' is a keyword of Python")
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", variant) or len(variant) > 50:
        raise ConfigError(
            f"{name!r} cannot be the name of a variant; use letters, digits and single dashes: my-variant"
            + (" (at most 50)" if len(variant) > 50 else "")
        )
    taken = {info.name: info.distribution for info in list_variants()} | FIRST_PARTY
    if variant in taken:
        raise ConfigError(f"a variant called '{variant}' exists already, in {taken[variant] or 'this process'}")
    if not author.strip() or any(sign in author for sign in '"\\{}') or author != plain(author, 200):
        raise ConfigError(
            f"author {author!r}: give a name without quotation marks, backslashes, braces, line breaks and control "
            "characters, of at most 200 characters"
        )
    folder = parent / f"lora-lite-{variant.replace('_', '-')}"
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; give another name or --folder")
    major, minor = version("lora-lite-core").split(".")[:2]
    words = {
        "variant": variant,
        "module": f"lora_lite_{variant}",
        "distribution": folder.name,
        "config": spelled.replace("-", "").replace("_", "") + "Config",
        "title": given if given != given.lower() else variant.replace("_", " ").capitalize(),
        "author": author,
        "year": (year := str(datetime.date.today().year)),
        "copyright": f"Copyright (c) {year} {author}",
        "fields": "r=4",
        "core": f"{major}.{minor}",
        "next_core": f"{major}.{int(minor) + 1}",
    }
    templates = files("lora_lite_core") / "cli" / "templates"
    modules = _copied(like, words) if like else {}
    with tempfile.TemporaryDirectory(dir=parent, prefix=".lora-lite-new-") as temporary:
        made = Path(temporary) / folder.name
        for template, place in FILES.items():
            path = made / string.Template(place).substitute(words)
            path.parent.mkdir(parents=True, exist_ok=True)
            text = (templates / template).read_text(encoding="utf-8")
            path.write_text(string.Template(text).substitute(words), encoding="utf-8")
        for module, text in modules.items():
            (made / words["module"] / module).write_text(text, encoding="utf-8")
        made.rename(folder)
    return folder


def _copied(like: str, words: dict[str, str]) -> dict[str, str]:
    """The module of the variant `like` under its new names, and the helpers that it imports: file name → text."""
    if like not in FIRST_PARTY:
        raise ConfigError(f"--from {like}: not a variant of this project; choose from {', '.join(FIRST_PARTY)}")
    variant = get_variant(like)
    source = Path(variant.namespace.__file__)
    text = source.read_text(encoding="utf-8")
    # What PEFT knows of the method does not hold for what becomes of the copy.
    text = re.sub(r"^(from \. import _peft|to_peft, from_peft = ).*\n", "", text, flags=re.M)
    helpers = re.findall(r"^from \.(\w+) import", text, flags=re.M)
    text = text.replace(variant.Config.__name__, words["config"])
    text = text.replace(f'variant = "{like}"', f'variant = "{words["variant"]}"')
    text = text.replace(
        '"""', f'"""{words["title"]}: what it does; begun as a copy of {like}, whose text follows.\n\n', 1
    )
    words["copyright"] += "\nCopyright (c) 2026 The lora-lite developers"
    words["fields"] = "r=4" if issubclass(variant.Config, RankConfig) else ""
    beside = {f"{helper}.py": source.with_name(f"{helper}.py").read_text(encoding="utf-8") for helper in helpers}
    return {"__init__.py": text, **beside}
