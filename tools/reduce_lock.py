"""Reduce uv.lock to pins: names, versions and markers, without any address of a package index.

    python tools/reduce_lock.py < uv.lock          print the reduced lock (the git clean filter)
    python tools/reduce_lock.py --check FILE…      exit 1 when a file still holds an address

uv reads the reduced file as version preferences, from whatever index it is configured with, and completes it in the
working tree. CONTRIBUTING.md says why. Standard library only, for it runs before anything is installed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

KEPT = ("name", "version", "source", "resolution-markers")


def reduce(lock: str) -> str:
    """Keep the head of the lock, the workspace's member list, and of each package the four fields above."""
    head, *packages = lock.split("[[package]]\n")
    head = re.sub(r"\[manifest\.[\s\S]*?(?=\n\[|\Z)", "", head)
    blocks = [head.strip() + "\n"]
    for package in packages:
        body = package.partition("\n[")[0]  # without [package.metadata] and the like
        blocks.append("[[package]]\n" + "".join(line + "\n" for line in _fields(body)))
    text = "\n".join(blocks)
    return re.sub(r'source = \{ registry = "[^"]*" \}', 'source = { registry = "." }', text)


def _fields(body: str) -> list[str]:
    """The kept fields of one package; an array runs until its closing bracket."""
    lines, keeping = [], False
    for line in body.splitlines():
        field = re.match(r"([\w-]+) = ", line)
        if field:
            keeping = field[1] in KEPT
        if keeping and line.strip():
            lines.append(line)
        if line == "]":
            keeping = False
    return lines


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--check"]:
        bad = [name for name in arguments[1:] if "://" in Path(name).read_text(encoding="utf-8")]
        for name in bad:
            print(f"{name} names a package index; type: just lock", file=sys.stderr)
        return bool(bad)
    sys.stdout.write(reduce(sys.stdin.read()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
