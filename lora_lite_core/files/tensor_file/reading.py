"""Tensors in a safetensors file, read through one open descriptor; writing is in writing.py.

Eight bytes of length, a JSON header {name: {"dtype", "shape", "data_offsets"}, "__metadata__": {str: str}}, the data.
Here, not by the safetensors package, because that opens a path a second time, reads with a copy more, and writes the
header in an order that differs from one run to the next. Nothing here imports torch before tensors are read.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from ...contract.errors import AdapterFileError
from ...contract.text import plain
from ...contract.untrusted_input import collector_paused, open_regular, parse_json, typed

if TYPE_CHECKING:
    from torch import Tensor

HEADER_LIMIT = 100_000_000  # bytes, as the safetensors package has it
# Bits of an element, and what torch calls the type; "" where torch has no tensors of it.
DTYPES = {
    "F64": (64, "float64"), "F32": (32, "float32"), "F16": (16, "float16"), "BF16": (16, "bfloat16"),
    "I64": (64, "int64"), "I32": (32, "int32"), "I16": (16, "int16"), "I8": (8, "int8"),
    "U64": (64, "uint64"), "U32": (32, "uint32"), "U16": (16, "uint16"), "U8": (8, "uint8"),
    "BOOL": (8, "bool"), "C64": (64, "complex64"),
    "F8_E4M3": (8, "float8_e4m3fn"), "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2": (8, "float8_e5m2"), "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"), "F8_E8M0": (8, "float8_e8m0fnu"),
    "F4": (4, ""), "F6_E2M3": (6, ""), "F6_E3M2": (6, ""),
}  # fmt: skip


class Entry(NamedTuple):
    """What the header says of one tensor; start and end count bytes of the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """An open safetensors file whose header has been read and found to fit the file's size.

    path      as it was given
    size      of the file in bytes
    metadata  {str: str}
    entries   {name: Entry}
    """

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        """Raises AdapterFileError when the header is none."""
        self.path = path
        self._stream = stream
        self._state = _state(stream)
        self.size = self._state[0]
        try:
            length = int.from_bytes(stream.read(8), "little") if self.size >= 8 else HEADER_LIMIT
            if length > min(HEADER_LIMIT, self.size - 8):
                raise ValueError("no length of a header")
            with collector_paused():
                header: dict[str, Any] = typed("the header", parse_json(stream.read(length)), dict)
                metadata = header.pop("__metadata__", None)
                self.metadata = {} if metadata is None else _texts("__metadata__", metadata)
                self.entries = {name: _entry(name, value) for name, value in header.items()}
        except (ValueError, OSError, MemoryError) as error:
            raise AdapterFileError(
                f"{plain(path)} is not a safetensors file, or its beginning is damaged ({plain(error)})"
            ) from None
        self._data = 8 + length
        self._check_layout()

    def read(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The tensors (those called `names`, or all) on the CPU, each in memory of its own.

        Raises AdapterFileError when the file has changed since it was opened, cannot be read, or holds a type that this
        torch has not. Takes as much memory as the tensors have bytes: look at `entries` before.
        """
        import torch

        found: dict[str, Tensor] = {}
        for name in sorted(self.entries if names is None else names, key=lambda name: self.entries[name].start):
            entry = self.entries[name]
            dtype = getattr(torch, DTYPES[entry.dtype][1], None)
            if dtype is None:
                raise AdapterFileError(f"{plain(self.path)}: {plain(name)} is {entry.dtype}, which torch cannot hold")
            data = self._bytes(entry)
            little_endian(data, dtype)
            # torch makes no tensor of a buffer without bytes
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            found[name] = flat.reshape(entry.shape)
        if _state(self._stream) != self._state:
            raise AdapterFileError(f"{plain(self.path)} was changed while it was read; try again")
        return {name: found[name] for name in self.entries if name in found}

    def _bytes(self, entry: Entry) -> bytearray:
        try:
            data = bytearray(entry.end - entry.start)
            self._stream.seek(self._data + entry.start)
            got = self._stream.readinto(data)  # type: ignore[attr-defined]
        except (OSError, MemoryError) as error:
            raise AdapterFileError(f"{plain(self.path)} cannot be read: {plain(error)}") from None
        if got != len(data):
            raise AdapterFileError(f"{plain(self.path)} was changed while it was read; try again")
        return data

    def _check_layout(self) -> None:
        """The tensors' bytes lie end to end and fill the file."""
        end = max((entry.end for entry in self.entries.values()), default=0)
        if self.size != self._data + end:
            raise AdapterFileError(
                f"{plain(self.path)} is cut short or damaged: {self.size:,} bytes where its header speaks of "
                f"{self._data + end:,}"
            )
        place = 0
        for name, entry in sorted(self.entries.items(), key=lambda item: item[1][2:]):
            if entry.start != place:
                raise AdapterFileError(
                    f"{plain(self.path)} is damaged: {plain(name)} begins at byte {entry.start:,} of the data, "
                    f"where {place:,} comes next"
                )
            place = entry.end


@contextmanager
def open_tensors(path: str | os.PathLike[str]) -> Generator[TensorFile, None, None]:
    """Open a safetensors file once, for its header and its tensors. Raises AdapterFileError for whatever is none."""
    try:
        stream = open_regular(path)
    except OSError as error:
        raise AdapterFileError(f"{plain(path)} cannot be read: {error.strerror or error}") from None
    with stream:
        yield TensorFile(Path(os.fsdecode(path)), stream)


def little_endian(data: bytearray, dtype: Any) -> None:
    """From the machine's order of bytes to the file's or back, in place."""
    width = dtype.itemsize // (2 if dtype.is_complex else 1)
    if sys.byteorder == "big":
        for place in range(width // 2):
            one, other = slice(place, None, width), slice(width - 1 - place, None, width)
            data[one], data[other] = data[other], data[one]


def _state(stream: BinaryIO) -> tuple[int, int]:
    found = os.fstat(stream.fileno())
    return found.st_size, found.st_mtime_ns


def _entry(name: str, value: Any) -> Entry:
    """ValueError where it is none, or its bytes do not fit its shape."""
    fields: dict[str, Any] = value if type(value) is dict else {}
    dtype: Any = fields.get("dtype")
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    if type(dtype) is str and dtype not in DTYPES:
        raise ValueError(f"dtype of {name} is {dtype!r}, not one of {', '.join(DTYPES)}")
    sound = type(dtype) is str and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2
    if not sound or prod(shape) * DTYPES[dtype][0] != (offsets[1] - offsets[0]) * 8:
        raise ValueError(f"{name} is {dtype!r} of shape {shape!r} in bytes {offsets!r}")
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(value: Any) -> bool:
    """Is it a list of up to 64 whole numbers from 0, each below 2**63?"""
    return type(value) is list and len(value) <= 64 and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _texts(what: str, value: Any) -> dict[str, str]:
    found = typed(what, value, dict)
    for key, text in found.items():
        typed(f"{what}: {key}", text, str)
    return found
