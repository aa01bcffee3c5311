"""How worker processes are begun. On Linux they are forked from a server, which imports what runs need once for all of
them, and while this process does so itself; elsewhere each is begun anew."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.context import BaseContext

PRELOADED = "lora_lite_bench.runs.run"
FORKED = sys.platform == "linux"  # on macOS a fork without exec breaks system libraries


def context() -> BaseContext:
    """Of the workers' processes."""
    return multiprocessing.get_context("forkserver" if FORKED else "spawn")


def begin_importing(jobs: int | None) -> None:
    """Start the server, without waiting for it, where so many jobs (None: one a core) will go side by side."""
    if FORKED and (jobs or cores()) > 1 and "WORLD_SIZE" not in os.environ:  # processes of torchrun share each run
        from multiprocessing import forkserver

        forkserver.set_forkserver_preload([PRELOADED])
        forkserver.ensure_running()


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
