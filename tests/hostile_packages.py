"""Packages that no well-meaning author has published, as pip would leave them in a folder of sys.path."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Union

GOOD = '''"""Evil: a working variant all the same."""
import lora_lite_core as core


class Config(core.AdapterConfig):
    variant = "evil"


@core.hookimpl
def param_specs(d_out):
    return {"lora_h": core.ParamSpec((d_out,))}


@core.hookimpl
def forward(y, params):
    return y + params["lora_h"].to(y.dtype)
'''
METADATA = "Metadata-Version: 2.1\nName: lora-lite-evil\nVersion: 1.5\n"
ESCAPES = "\x1b]0;gone\x07\x1b[2J\u202e\x9b31m"
Content = Union[str, bytes, Callable[[Path], object], None]  # noqa: UP007 (evaluated at run time by Python 3.10)


@dataclass(frozen=True)
class Case:
    """The row that the listing shows, and the error of get_variant ("" for none) where it is asked for."""

    state: str = "broken"
    detail: str = ""
    error: str = ""
    name: str = "evil"
    value: str = "lora_lite_evil"
    source: Content = GOOD
    points: Content = ""  # of name and value
    metadata: Content = METADATA
    folder: str = "lora_lite_evil-1.5.dist-info"


def write(path: Path, content: Content) -> None:
    if callable(content):
        content(path)
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def install(folder: Path, case: Case) -> None:
    write(folder / "lora_lite_evil.py", case.source)
    (folder / case.folder).mkdir()
    points = f"[lora_lite.variants]\n{case.name} = {case.value}\n"
    write(folder / case.folder / "entry_points.txt", points if case.points == "" else case.points)
    write(folder / case.folder / "METADATA", case.metadata)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(2**40)


NO_NAME = "is no name; use ASCII letters, digits, _ and -"
NO_MODULE = "names no module"
SOURCES: dict[str, Case] = {
    "no utf-8": Case(source=b'"""\xff"""', detail="can't decode byte 0xff"),
    "another encoding": Case(source=b"# coding: idna\n" + b'"' + b"a" * 10**5 + b'"', state="ok"),
    "zeros": Case(source=b"\0" * 100, detail="null bytes"),
    "a pipe": Case(source=pipe, detail="has no source file"),
    "endless": Case(source=endless, detail="has no source file"),
    "sparse": Case(source=sparse, detail="it is larger than 131,072 bytes"),
    "a folder": Case(source=Path.mkdir, detail="has no source file"),
    "none": Case(source=None, detail="module lora_lite_evil has no source file"),
    "a megabyte": Case(source="a\n" * 500_000, detail="it is larger than 131,072 bytes"),
    "many statements": Case(source="a\n" * 65_000, state="ok"),
    "brackets": Case(source="(" * 5000, detail="too many nested parentheses"),
    "lists": Case(source="x = " + "[" * 150 + "]" * 150, state="ok"),
    "lambdas": Case(source="x = " + "lambda:" * 10_000 + "1"),
    "attributes": Case(source="x = a" + ".b" * 60_000, detail="RecursionError"),
    "sums": Case(source="x = 1" + "+1" * 60_000, detail="RecursionError"),
    "branches": Case(source="if a:b\n" + "elif a:b\n" * 10_000),
    "signs": Case(source="x = " + "-" * 100_000 + "1"),
    "digits": Case(source="x = " + "9" * 100_000),
    "syntax": Case(source="def broken(:\n", detail="invalid syntax"),
    "escapes that warn": Case(source='"""Evil \\d."""\nx = "\\d' + ESCAPES + '"\n', state="ok"),
    "a mark of byte order": Case(source="\ufeff" + GOOD, state="ok"),
    "empty": Case(source=b"", state="ok", error="has no Config"),
    "a long docstring": Case(source=f'"""{"d" * 120_000}"""', state="ok"),
    "escapes in the docstring": Case(source=f'"""{ESCAPES}\n{ESCAPES}"""', state="ok"),
    "a strange config": Case(source="Config = " + "a + " * 300 + "1", state="ok"),
}
POINTS: dict[str, Case] = {
    **{f"value {value!r}"[:40]: Case(value=value, detail=NO_MODULE, error=NO_MODULE) for value in (
        "", ":", "lora_lite_evil:thing", "..", ".evil", "a b", "a\0b", "import os", "-m evil", "a.", "1a", "../evil", "x\x1b[2J", "a " * 10**5,
    )},
    "value __main__": Case(value="__main__", detail="is the program that runs", error="is the program that runs"),
    "value __main__.x": Case(value="__main__.x", detail="is the program that runs", error="is the program that runs"),
    "value sys": Case(value="sys", state="ok", error="has no Config"),
    "value json": Case(value="json", state="ok", error="has no Config"),
    "value os.path": Case(value="os.path", detail="no source file", error="has no Config"),
    "value of another": Case(value="lora_lite_lora.lora", state="ok", error="Config.variant is 'lora'"),
    "value nowhere": Case(value="nowhere.to.be.found", detail="no source file", error="cannot be imported: ModuleNotFoundError"),
    "value long": Case(value="x" * 10**5, error="cannot be imported"),
    **{f"name {name!r}"[:40]: Case(name=name, detail=NO_NAME) for name in (
        "", "lo ra", ESCAPES, "l\u043era", "x" * 10**5, "../x", "--help", "a;rm -rf", "a.b", "é", "a\u200db", "'", "a,b", ":",
    )},
    "twice": Case(points="[lora_lite.variants]\nevil = lora_lite_evil\nevil = json\n", detail="names 'evil' more than once", error="names 'evil' more than once"),
    "twice the same": Case(points="[lora_lite.variants]\nevil = lora_lite_evil\n" * 2, state="ok"),
    "no equals sign": Case(points="[lora_lite.variants]\nevil\n", detail=NO_MODULE, error=NO_MODULE),
    "thousands": Case(points="[lora_lite.variants]\n" + "".join(f"v{i} = json\n" for i in range(50_000)), detail="it names 50,000 in lora_lite.variants, where 100 are the most"),
    "no utf-8": Case(points=b"[lora_lite.variants]\nevil = lora_lite_evil\xff\n", detail="entry_points.txt cannot be read: 'utf-8' codec"),
    "a pipe": Case(points=pipe, detail="entry_points.txt cannot be read: it is a named pipe"),
    "endless": Case(points=endless, detail="entry_points.txt cannot be read: it is a device"),
    "sparse": Case(points=sparse, detail="entry_points.txt cannot be read: it is larger than 1,000,000 bytes"),
    "a folder": Case(points=Path.mkdir, detail="entry_points.txt cannot be read: it is a directory"),
    "other sections": Case(points="]\n[[\n[x]\nno\n[lora_lite.variants]\n; a\n# b\nevil = lora_lite_evil\n[y]\n=\n", state="ok"),
}  # fmt: skip
METADATAS: dict[str, Case] = {
    "missing": Case(metadata=None, detail="it has no METADATA with its name", error="it has no METADATA"),
    "empty": Case(metadata=b"", detail="it has no METADATA with its name", error="it has no METADATA"),
    "a pipe": Case(metadata=pipe, detail="METADATA cannot be read: it is a named pipe", error="METADATA cannot be read"),
    "endless": Case(metadata=endless, detail="METADATA cannot be read: it is a device", error="METADATA cannot be read"),
    "a folder": Case(metadata=Path.mkdir, detail="METADATA cannot be read: it is a directory", error="METADATA cannot be read"),
    "sparse": Case(metadata=sparse, detail="it has no METADATA with its name", error="it has no METADATA"),
    "no utf-8": Case(metadata=METADATA.encode() + b"Author: \xff\n", state="ok"),
    "long": Case(metadata=METADATA + "\n" + "x" * 5 * 10**6, state="ok"),
    "long headers": Case(metadata=METADATA + "Author: x\n" * 200_000, state="ok"),
    "another name": Case(metadata=METADATA.replace("-evil", "-lora"), detail="calls it lora-lite-lora, its folder lora_lite_evil", error="calls it lora-lite-lora"),
    "a name of escapes": Case(metadata=METADATA.replace("evil", ESCAPES), detail="is no name of a package", error="is no name"),
    "a command": Case(metadata=METADATA.replace("evil", "evil --index-url https://evil.invalid"), detail="is no name of a package", error="is no name"),
    "no version": Case(metadata="Name: lora-lite-evil\n", state="ok"),
    "a version of escapes": Case(metadata=METADATA.replace("1.5", ESCAPES + "; type: pip install worse"), state="ok"),
    "a wrong requirement": Case(metadata=METADATA + "Requires-Dist: lora-lite-core >=>= \x1b[2J\n", state="ok", error="which is no requirement"),
    "an unknown marker": Case(metadata=METADATA + "Requires-Dist: lora-lite-core; evil == '1'\n", state="ok", error="which is no requirement"),
    "names of paths": Case(folder="lora_lite_evil-1.5-\x1b[2J.dist-info", state="ok"),
}  # fmt: skip
IMPORTS: dict[str, Case] = {
    "exit": Case(source="raise SystemExit('bye')", state="ok", error="cannot be imported: SystemExit: bye"),
    "an own exception": Case(source="class E(BaseException): pass\nraise E", state="ok", error="cannot be imported: E"),
    "no text": Case(source="class E(Exception):\n    def __str__(self): 1 / 0\nraise E", state="ok", error="cannot be imported: E: <E>"),
    "a long text": Case(source="raise ValueError('\\x1b[2J\\u202e' * 10**6)", state="ok", error="cannot be imported: ValueError: \\x1b[2J"),
    "attributes that raise": Case(source=GOOD + "def __getattr__(name): raise ValueError(name)\n", state="ok", error="cannot be read: ValueError"),
    "a config of metal": Case(source=GOOD + "class Meta(type):\n    @property\n    def variant(self): raise ValueError\nclass Config(core.AdapterConfig, metaclass=Meta): pass\n", state="ok", error="cannot be read: ValueError"),
    "a tolerance of nan": Case(source=GOOD + "IDENTITY_ATOL = float('nan')\n", state="ok", error="IDENTITY_ATOL is nan; give a number from 0"),
    "depth": Case(source=GOOD + "def f(): return f()\nf()\n", state="ok", error="cannot be imported: RecursionError"),
}  # fmt: skip


def package(folder: Path, name: str, variant: str, source: str | None = None) -> None:
    """A sound package of one variant."""
    stem = name.replace("-", "_").lower()
    (folder / f"{stem}.py").write_text(source or GOOD.replace("evil", variant), encoding="utf-8")
    (folder / f"{stem}-1.5.dist-info").mkdir()
    (folder / f"{stem}-1.5.dist-info/METADATA").write_text(f"Name: {name}\nVersion: 1.5\n", encoding="utf-8")
    points = f"[lora_lite.variants]\n{variant} = {stem}\n"
    (folder / f"{stem}-1.5.dist-info/entry_points.txt").write_text(points, encoding="utf-8")
