"""Ending a run that goes on in a thread: it looks, before every step and every batch, whether it is to go on."""

from __future__ import annotations

import threading

_asked = threading.Event()


class Stopped(Exception):
    """A run was asked to end before it was finished."""


def stop() -> None:
    """Ask the runs of this process to end."""
    _asked.set()


def allow() -> None:
    """Runs may begin."""
    _asked.clear()


def go_on() -> None:
    """Raises Stopped in a process whose runs are to end."""
    if _asked.is_set():
        raise Stopped
