"""Files that appear whole or not at all, and tensors as such a file: the same tensors give the same bytes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...contract.errors import AdapterFileError
from ...contract.text import plain
from .reading import DTYPES, HEADER_LIMIT, little_endian

try:
    import fcntl
except ImportError:  # Windows, which has no such lock: there nothing that was left over is removed
    fcntl = None

if TYPE_CHECKING:
    from typing import Union

    from torch import Tensor

    Part = Union[bytes, bytearray, memoryview]  # noqa: UP007 (evaluated by type checkers only)

_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_OLD = os.O_RDWR | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"))


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file of the tensors (of any device, one copied at a time) and texts.

    Its bytes depend on these alone. Raises AdapterFileError as `write_whole` does, and for a tensor without values or
    of a type that the format has not.
    """
    codes = {name: code for code, (_, name) in DTYPES.items() if name}
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    kinds: dict[str, str] = {}
    for name, tensor in tensors.items():
        kinds[name] = codes.get(str(tensor.dtype).removeprefix("torch."), "")
        if not kinds[name] or tensor.is_meta or tensor.is_sparse or tensor.is_quantized:
            what = "on meta, without values" if tensor.is_meta else f"a {tensor.layout} tensor of {tensor.dtype}"
            raise AdapterFileError(f"{plain(path)}: {plain(name)} is {what}, which no file holds")
    # The widest numbers first, so that each tensor lies at a multiple of its numbers' size.
    order = sorted(tensors, key=lambda name: (-DTYPES[kinds[name]][0], name))
    place = 0
    for name in order:
        end = place + tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": kinds[name], "shape": list(tensors[name].shape), "data_offsets": [place, end]}
        place = end
    try:
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise AdapterFileError(f"{plain(path)}: a name that is no text: {plain(error)}") from None
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise AdapterFileError(
            f"{plain(path)} would have a header of {len(text):,} bytes; {HEADER_LIMIT:,} are the most"
        )

    def parts() -> Iterator[Part]:
        yield len(text).to_bytes(8, "little")
        yield text
        for name in order:
            try:
                part = _bytes_of(tensors[name])
            except (RuntimeError, TypeError) as error:  # of a tensor subclass that is no array of numbers
                raise AdapterFileError(f"{plain(path)}: {plain(name)} cannot be written: {plain(error)}") from error
            yield part

    write_whole(path, parts())


def write_whole(path: str | os.PathLike[str], parts: Iterable[Part]) -> None:
    """Write the parts beside `path`, sync, rename: whoever reads sees the old file or the new one. A link stays a link.

    Removes what a process that was killed has left of this file. Raises AdapterFileError for whatever the system
    refuses; then nothing has changed.
    """
    target = real_path(path)
    if not os.path.isdir(target.parent):  # unlike Path.is_dir, never an error
        raise AdapterFileError(f"folder {plain(target.parent)} does not exist; make it first")
    try:
        if os.path.lexists(target) and not stat.S_ISREG(kind := os.lstat(target).st_mode):
            what = {stat.S_IFDIR: "a directory", stat.S_IFLNK: "a link to itself"}.get(stat.S_IFMT(kind), "no file")
            raise OSError(errno.EINVAL, f"it is {what}")
        _remove_leftovers(target)
        _replace(target, parts)
    except OSError as error:
        raise AdapterFileError(f"{plain(path)} cannot be written: {error.strerror or error}") from None


def real_path(path: str | os.PathLike[str]) -> Path:
    """The path with its links followed. AdapterFileError for what is no path."""
    try:
        return Path(os.path.realpath(os.fsdecode(path)))
    except (TypeError, ValueError, OSError) as error:
        raise AdapterFileError(f"{plain(path)} cannot be written: {plain(error)}") from None


def _replace(target: Path, parts: Iterable[Part]) -> None:
    made: list[Path] = []
    try:
        temporary, descriptor = _temporary(target, made)
        with os.fdopen(descriptor, "wb") as stream:
            for part in parts:
                stream.write(part)
            stream.flush()
            os.fsync(stream.fileno())
            if fcntl is not None:  # while it is locked, no other process takes it for a leftover
                os.replace(temporary, target)
        if fcntl is None:
            os.replace(temporary, target)
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _temporary(target: Path, made: list[Path]) -> tuple[Path, int]:
    """A new file beside the target, with ordinary permissions and locked for as long as it is open. Its path is in
    `made` before it is there."""
    for _ in range(100):
        path = target.with_name(f"{_stem(target)}{secrets.token_hex(4)}.tmp")
        made[:] = [path]
        try:
            descriptor = os.open(path, _NEW, 0o666)
        except FileExistsError:
            made.clear()
            continue
        if _lock(descriptor) and os.fstat(descriptor).st_nlink:
            return path, descriptor
        os.close(descriptor)  # another process took it for a leftover before it was locked
    raise OSError(errno.EEXIST, "no temporary file can be kept beside it")


def _stem(target: Path) -> str:
    """What the names of the target's temporary files begin with, and those of no other target's."""
    name = os.fsencode(target.name)
    return f".{target.name}." if len(name) <= 200 else f".{hashlib.sha256(name).hexdigest()}."


def _lock(descriptor: int) -> bool:
    """False when another process holds it. A file system that knows no locks holds none."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _remove_leftovers(target: Path) -> None:
    """Temporary files of this target (by the names that earlier versions gave them, too) that nobody has locked: a
    killed process loses its locks."""
    if fcntl is None:
        return
    try:
        temporary = re.compile(re.escape(_stem(target)) + r"[a-z0-9_]{8}\.tmp")
        paths = [path for path in target.parent.iterdir() if temporary.fullmatch(path.name)]
    except OSError:  # a folder that may be written and not be read
        return
    for path in paths:
        try:
            descriptor = os.open(path, _OLD)
        except OSError:  # gone, or not ours
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        except OSError:  # at work
            pass
        finally:
            os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """So that the new name outlives a power cut; not every system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _bytes_of(tensor: Tensor) -> Part:
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    array = flat.view(torch.uint8).numpy()
    if sys.byteorder == "little":
        return array.data
    data = bytearray(array)
    little_endian(data, tensor.dtype)
    return data
