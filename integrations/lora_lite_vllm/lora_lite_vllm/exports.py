"""An adapter file as a LoRA folder for the server, made in a process of its own, once for each content of the file."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

import lora_lite_core as ll

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Settings:
    """Read from the environment, as vLLM's own resolvers do.

    adapters  LORA_LITE_ADAPTERS: the folder with NAME.safetensors of each adapter that may be served
    rank      LORA_LITE_MAX_RANK: the server's --max-lora-rank, 16 unless given, as there
    tol       LORA_LITE_TOL: largest relative error ‖ΔW − B A‖ / ‖ΔW‖ of a layer, 1e-5 unless given
    exports   LORA_LITE_EXPORTS: where the exports are kept; unless given, in a folder that ends with the process
    """

    adapters: Path
    rank: int = 16
    tol: float = 1e-5
    exports: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="lora-lite-exports-")))

    @classmethod
    def from_environment(cls) -> Settings | None:
        """None where LORA_LITE_ADAPTERS is not set. Raises ConfigError for values that make no sense."""
        adapters = os.environ.get("LORA_LITE_ADAPTERS")
        if not adapters:
            return None
        if not Path(adapters).is_dir():
            raise ll.ConfigError(f"LORA_LITE_ADAPTERS={adapters}: there is no such folder")
        rank, tol = os.environ.get("LORA_LITE_MAX_RANK", "16"), os.environ.get("LORA_LITE_TOL", "1e-5")
        if not rank.isdecimal() or int(rank) < 1:
            raise ll.ConfigError(f"LORA_LITE_MAX_RANK={rank}: the rank of --max-lora-rank is a whole number from 1")
        try:
            if not float(tol) >= 0:
                raise ValueError
        except ValueError:
            raise ll.ConfigError(f"LORA_LITE_TOL={tol}: the largest relative error is a number from 0") from None
        given = os.environ.get("LORA_LITE_EXPORTS")
        kept = {"exports": Path(given)} if given else {}
        return cls(Path(adapters), int(rank), float(tol), **kept)


def file_of(settings: Settings, name: str) -> Path | None:
    """The adapter file that a request means by this name; None where there is none. Names are no paths."""
    if not _NAME.fullmatch(name):
        return None
    path = settings.adapters / f"{name}.safetensors"
    return path if path.is_file() else None


async def exported(settings: Settings, base: str, name: str) -> Path | None:
    """The LoRA folder of the adapter called `name` on this base model; None where there is no such file.

    Made by another process, so that the server goes on and keeps no second base. Raises MergeError with its text where
    the adapter cannot be served at the rank and tolerance of `settings`, is made for another base, or is damaged.
    """
    path = file_of(settings, name)
    if path is None:
        return None
    settings.exports.mkdir(parents=True, exist_ok=True)
    content = hashlib.sha256(path.read_bytes() + f"|{base}|{settings.rank}|{settings.tol}".encode()).hexdigest()
    folder = settings.exports / f"{name}-{content[:16]}"
    if not (folder / CONFIG).is_file():
        given = (str(path), base, str(folder), str(settings.rank), repr(settings.tol))
        made = await asyncio.create_subprocess_exec(
            sys.executable, "-m", __name__, *given, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )
        _, said = await made.communicate()
        if made.returncode:
            text = said.decode("utf-8", "replace").rpartition(MARK)[2].strip()
            raise ll.MergeError(f"adapter '{name}' is not served: {text}")
    return folder


MARK = "lora-lite-vllm: "  # before the reason, behind whatever other packages have printed


def export(path: Path, base: str, folder: Path, rank: int, tol: float) -> None:
    """Write the adapter in `path` as a LoRA of at most this rank; the folder is there when it is complete. Raises
    MergeError with the error that it would have where that is above `tol`, and what `load` and `export_lora` raise."""
    from lora_lite_core.files.peft.serving.verifying import load_base

    model = load_base(base)
    ll.load(model, path, trainable=False)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as beside:
        made = Path(beside) / "lora"
        _write(model, made, rank, tol)
        try:
            os.replace(made, folder)
        except OSError:
            if not (folder / CONFIG).is_file():  # else another server was faster
                raise


def _write(model: nn.Module, folder: Path, rank: int, tol: float) -> None:
    needed = "more than its layers have"
    try:
        made = ll.export_lora(model, folder, tol=tol)
        if made.rank <= rank:
            return
        needed = str(made.rank)
    except ll.MergeError as error:
        if "needs rank" not in str(error):
            raise
    made = ll.export_lora(model, folder, rank=rank)
    worst = max(made.errors.values())
    if worst > tol:
        raise ll.MergeError(
            f"its change needs rank {needed}, and at the server's rank of {rank} the worst layer is off by {worst:.2g} "
            f"(relative)\n  start the server with a larger --max-lora-rank and LORA_LITE_MAX_RANK, accept the error "
            f"with LORA_LITE_TOL={worst * 1.05:.2g}, or serve the merged model"
        )


def main(path: str, base: str, folder: str, rank: str, tol: str) -> None:
    try:
        export(Path(path), base, Path(folder), int(rank), float(tol))
    except ll.LoraLiteError as error:
        sys.exit(f"{MARK}{error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
