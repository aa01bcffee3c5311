"""Reading what strangers wrote: regular files alone, whatever stands at a path, and JSON of bounded depth and size."""

from __future__ import annotations

import errno
import gc
import json
import os
import stat
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, BinaryIO

from .text import plain

# Without O_NONBLOCK a named pipe would wait for a writer for ever; O_NOCTTY keeps a terminal from becoming ours.
_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"))
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
JSON_VALUES = 2_500_000  # an adapter on 40,000 layers has 2 million; these take two seconds
JSON_DEPTH = 50
JSON_DIGITS = 40


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """The file at `path`, opened once. OSError with a `strerror` for whatever is no regular file or no path at all."""
    try:
        descriptor = os.open(path, _FLAGS)
    except (TypeError, ValueError) as error:  # no path; NUL in it; not to be encoded
        raise OSError(errno.EINVAL, str(error)) from None
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, f"it is {_KINDS.get(stat.S_IFMT(mode), 'no file')}")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | os.PathLike[str], most: int, *, cut: bool = False) -> bytes:
    """All bytes of a regular file. OSError when there are more than `most`; with `cut`, the first `most` of them."""
    with open_regular(path) as stream:
        found = stream.read(most + 1) or b""
    if len(found) > most and not cut:
        raise OSError(errno.EFBIG, f"it is larger than {most:,} bytes")
    return found[:most]


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text. ValueError for all that is not plain JSON: bytes that are no UTF-8, nesting, numbers or
    amounts beyond what an adapter has, a key that stands twice."""
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    if (values := sum(text.count(sign) for sign in ",[{")) > JSON_VALUES:
        raise ValueError(f"{values:,} values, where {JSON_VALUES:,} are the most")
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_int=_whole)
    except RecursionError:
        raise ValueError("values in values without end") from None
    level: list[Any] = [value]
    for _ in range(JSON_DEPTH):
        level = [part for held in level for part in _parts(held) if isinstance(part, (dict, list))]
        if not level:
            return value
    raise ValueError(f"values in values, more than {JSON_DEPTH} deep")


@contextmanager
def collector_paused() -> Generator[None, None, None]:
    """For making many small objects that stay: Python's cycle collector would take more time than they do."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def typed(what: str, value: Any, kind: type) -> Any:
    """The value; ValueError when it is not exactly of that type (True is no int)."""
    if type(value) is not kind:
        raise ValueError(f"{plain(what)} is {plain(repr(value))}, not a {kind.__name__}")
    return value


def _parts(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {twice!r} stands twice")
    return found


def _whole(digits: str) -> int:
    if len(digits) > JSON_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)
