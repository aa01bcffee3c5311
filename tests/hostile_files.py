"""A table of files that no well-meaning program has written, and of paths that are none. Used for inspect and for load."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .make_golden import GOLDEN

VALID = GOLDEN / "lora.safetensors"
LAYER = "layers.0.up_proj"
KEY = f"{LAYER}.lora_A"
DEEP = json.loads("[" * 200 + "]" * 200)
WRONG: dict[str, Any] = {
    "null": None, "true": True, "float": 1.5, "negative": -1, "zero": 0, "huge": 2**70, "nan": float("nan"), "text": "abc",
    "empty": "", "escape": "\x1b]0;gone\x07\x1b[2J\u202e", "long": "x" * 10**6, "list": [1, "a", None], "lists": [[], [[]]],
    "true list": [True], "huge list": [2**70], "nothing": [], "dict": {"a": {"b": 1}}, "no keys": {}, "deep": DEEP,
}  # fmt: skip
FIELDS = ("variant", "config", "targets", "seed", "core_version", "plugin")
OF_A_TARGET = ("d_in", "d_out", "storage", "overrides", "fingerprint")
CONFIG = (
    "dtype", "target_names", "exclude_names", "target_roles", "layers", "train_modules", "r", "rank_pattern", "alpha",
    "alpha_pattern", "rslora",
)  # fmt: skip
BOMB = "(a+)+$" * 20


def parts(file: bytes | None = None) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Header, the adapter's own fields, and data of a valid file."""
    text = VALID.read_bytes() if file is None else file
    length = int.from_bytes(text[:8], "little")
    header = json.loads(text[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["adapter"]), text[8 + length :]


def joined(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def with_adapter(adapter: Any, *, raw: str | None = None, file: bytes | None = None) -> bytes:
    header, _, data = parts(file)
    header["__metadata__"]["adapter"] = json.dumps(adapter) if raw is None else raw
    return joined(header, data)


def with_field(*path: str, value: Any) -> bytes:
    """The valid file with another value at a place of its adapter's fields."""
    _, adapter, _ = parts()
    place = adapter
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return with_adapter(adapter)


def with_entry(**changes: Any) -> bytes:
    header, _, data = parts()
    header[KEY] = {**header[KEY], **changes}
    return joined(header, data)


def with_header(change: Callable[[dict[str, Any]], Any]) -> bytes:
    header, _, data = parts()
    change(header)
    return joined(header, data)


def with_metadata(value: Any) -> bytes:
    return with_header(lambda header: header.update(__metadata__=value))


def raw_files() -> dict[str, bytes]:
    """Bytes that break a reader of the container."""
    valid = VALID.read_bytes()
    header, adapter, data = parts()
    two = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    rest = json.dumps({key: value for key, value in adapter.items() if key != "seed"})[1:]
    lengths = {
        f"length {n}": n.to_bytes(8, "little") + valid[8:] for n in (0, 1, 3 * 10**9, 10**8 + 1, 2**63, 2**64 - 1)
    }
    cuts = {f"first {n} bytes": valid[:n] for n in (0, 1, 7, 8, 9, 100, len(valid) - 1)}
    texts = {
        "not json": b"{]", "a list": b"[]", "a number": b"1", "null": b"null", "no utf-8": b'{"\xff": 1}',
        "utf-16": '{"a": 1}'.encode("utf-16"), "bom": b"\xef\xbb\xbf{}", "deep": b'{"a":' * 10**5, "deep lists": b"[" * 10**6,
        "deep and closed": b'{"a":' + b"[" * 900 + b"]" * 900 + b"}", "too many": b'{"a":[' + b"[]," * 2 * 10**6 + b"0]}",
        "digits": b'{"a":' + b"9" * 10**5 + b"}", "empty": b"", "spaces": b" " * 100, "zeros": b"\0" * 100, "twice": b'{"a":1,"a":2}',
        "empty object": b"{}", "surrogate": b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        "float offsets": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4.0]}}', "nan": b'{"a":NaN}', "infinity": b'{"a":-Infinity}',
        "key of a million": b'{"' + b"k" * 10**6 + b'":1}', "escapes in a key": b'{"\\u001b[2J\\u202e":1}',
    }  # fmt: skip
    return {
        **lengths, **cuts, **{f"header: {name}": joined(text, b"\0" * 4) for name, text in texts.items()},
        "another format": b"PK\x03\x04" + bytes(range(250)), "zeros": b"\0" * 10_000, "ones": b"\xff" * 10_000,
        "more data": valid + b"\0", "overlap": joined({"a": two, "b": two}, b"\0" * 4),
        "hole": joined({"a": two, "b": {**two, "data_offsets": [8, 12]}}, b"\0" * 12),
        "begins late": joined({"a": {**two, "data_offsets": [4, 8]}}, b"\0" * 8),
        "backwards": joined({"a": {**two, "data_offsets": [4, 0]}}, b"\0" * 4),
        "no metadata": joined({"a": two}, b"\0" * 4), "metadata alone": joined({"__metadata__": {}}),
        "a seed twice": with_adapter(None, raw='{"seed": 1, "seed": 2, ' + rest), "adapter: no json": with_adapter(None, raw="{"),
        "adapter: deep": with_adapter(None, raw="[" * 10**5), "adapter: a seed of digits": with_adapter(None, raw='{"seed":' + "9" * 5000 + "," + rest),
        "adapter: field too many": with_adapter({**adapter, "path": "x\x1b[2J", "self": 1}),
        "another version": with_metadata({"format": "lora-lite", "format_version": "9\x1b[2J" + "9" * 10**6}),
        "no adapter": with_metadata({"format": "lora-lite", "format_version": "1"}),
        "no offsets": joined({"a": {"dtype": "F32", "shape": [1]}}, b"\0" * 4), "tensor a list": joined({"a": [1]}, b""),
        "scalar": joined({"__metadata__": header["__metadata__"], "a": {**two, "shape": []}}, b"\0" * 4),
        "data of others": joined(header, data[::-1]),
    }  # fmt: skip


def files() -> dict[str, bytes]:
    """All, by what is wrong with them; some are merely odd."""
    found = raw_files()
    for name, value in WRONG.items():
        found |= {f"{field} is {name}": with_field(field, value=value) for field in FIELDS}
        found |= {
            f"target's {field} is {name}": with_field("targets", LAYER, field, value=value) for field in OF_A_TARGET
        }
        found |= {
            f"plugin's {field} is {name}": with_field("plugin", field, value=value)
            for field in ("distribution", "version")
        }
        found |= {
            f"entry's {field} is {name}": with_entry(**{field: value}) for field in ("dtype", "shape", "data_offsets")
        }
        found |= {
            f"metadata is {name}": with_metadata(value),
            f"tensor is {name}": with_header(lambda h, v=value: h.update({KEY: v})),
        }
        found[f"format is {name}"] = with_metadata({"format": value, "format_version": "1"})
        found[f"target is {name}"] = with_field("targets", LAYER, value=value)
    for field in FIELDS:
        found[f"without {field}"] = with_adapter({key: value for key, value in parts()[1].items() if key != field})
    return found


def configs() -> dict[str, bytes]:
    """Headers that are sound, with a config that does not fit or never ends."""
    found = {
        f"config's {field} is {name}": with_field("config", field, value=value)
        for field in CONFIG
        for name, value in WRONG.items()
    }
    found |= {
        f"override {field} is {name}": with_field("targets", LAYER, "overrides", value={field: value})
        for field in ("r", "alpha", "x\x1b[2J", "self")
        for name, value in WRONG.items()
    }
    for field in ("target_names", "exclude_names", "train_modules"):
        found |= {
            f"{field} is a bomb": with_field("config", field, value=[BOMB]),
            f"{field} is open": with_field("config", field, value=["(" * 5000]),
        }
        found[f"{field} are costly"] = with_field("config", field, value=["(?i)" + "[a-\U0010ffff]" * 2000])
    for field in ("rank_pattern", "alpha_pattern"):
        found |= {
            f"{field} is a bomb": with_field("config", field, value={BOMB: 1}),
            f"{field} is open": with_field("config", field, value={"(" * 5000: 1}),
        }
    found["package is a command"] = with_field(
        "plugin", value={"distribution": "evil --index-url https://evil.invalid", "version": "1"}
    )
    found["version is a command"] = with_field(
        "plugin", value={"distribution": "x", "version": "1; type: pip install evil"}
    )
    return found


def places(folder: Path) -> dict[str, Any]:
    """Paths that hold no file, and things that are no path."""
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    (folder / "dangling.safetensors").symlink_to("nowhere")
    (folder / "zero.safetensors").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(folder)  # its path has to be short
        server.bind("socket.safetensors")
        os.chdir(here)
    with open(folder / "sparse.safetensors", "wb") as stream:
        stream.truncate(2**40)
    inside = {
        name: folder / f"{name}.safetensors"
        for name in ("pipe", "loop", "dangling", "zero", "socket", "sparse", "missing")
    }
    return {
        **inside, "folder": folder, "root": "/", "zeros": "/dev/zero", "null": "/dev/null", "terminal": "/dev/tty", "memory": "/proc/self/mem",
        "messages": "/proc/kmsg", "nul": f"{folder}/a\0.safetensors", "long name": folder / ("a" * 300 + ".safetensors"), "long path": "a/" * 10**5 + "x",
        "surrogate": f"{folder}/\ud800.safetensors", "escapes": f"{folder}/\x1b[2J\u202e\n.safetensors", "empty": "", "point": ".", "a million": "x" * 10**6,
        "under a file": VALID / "a.safetensors", "bytes": b"no.safetensors", "number": 3, "true": True, "float": 1.5, "none": None, "list": ["a"], "object": object(), "type": Path,
    }  # fmt: skip


def safe(text: str, most: int = 60_000) -> bool:
    """Nothing that a terminal would obey, and no line or text without end."""
    shown = not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)
    return shown and max(map(len, text.split("\n"))) <= 3_000 and len(text) <= most


@contextmanager
def at_once(seconds: float = 8.0) -> Generator[None, None, None]:
    """The processor's time, so that a busy machine does not count; what waits for ever is woken after a minute."""

    def wake(*_: object) -> None:
        raise TimeoutError("still waiting after a minute")

    before = signal.signal(signal.SIGALRM, wake)
    signal.alarm(60)
    start = time.process_time()
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert time.process_time() - start < seconds
