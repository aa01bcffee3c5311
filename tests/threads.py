"""Threads that do what they are told, one thing after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any


class Thread:
    """Another thread, which runs one function after the other and hands the result back."""

    def __init__(self) -> None:
        self._given: SimpleQueue[Any] = SimpleQueue()
        self._done: SimpleQueue[Any] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (function := self._given.get()) is not None:
            try:
                self._done.put((function(), None))
            except BaseException as error:
                self._done.put((None, error))

    def start(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Have it done; what comes back waits for the result."""
        self._given.put(function)
        return self._wait

    def _wait(self) -> Any:
        result, error = self._done.get(timeout=60)
        if error is not None:
            raise error
        return result

    def __call__(self, function: Callable[[], Any]) -> Any:
        return self.start(function)()

    def end(self) -> None:
        self._given.put(None)
        self._thread.join(60)
