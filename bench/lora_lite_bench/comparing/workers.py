"""Runs side by side: one process a core, each with one thread, so that neither their number nor their order changes a
result."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..machine.forks import context
from ..machine.stopping import allow, stop
from ..runs.run import Job, Result, run
from .results import ResultsFile
from .sweep import Plan

Submit = Callable[[Job, Path], "Future[Result]"]


def nothing() -> None:
    """Called once a step where nobody counts them."""


@contextmanager
def workers(count: int, advance: Callable[[], None] = nothing, threads: int | None = 1) -> Generator[Submit]:
    """A function that starts a job, given the folder for its unfinished states, and returns its future. With a count of
    1 the jobs run in this process, one after the other: what was registered in it is there, `advance` is called once a
    training step, and `threads` are torch's, None as many as it likes."""
    if count == 1:
        with ThreadPoolExecutor(1, initializer=quiet, initargs=(threads,)) as thread:
            try:
                yield lambda job, place: thread.submit(run, job, place, advance)
            except BaseException:
                stop()
                raise
            finally:
                thread.shutdown(wait=True, cancel_futures=True)
                allow()
        return
    pool = ProcessPoolExecutor(count, context(), _start)
    try:
        yield lambda job, place: pool.submit(run, job, place)
    finally:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:  # a run takes seconds: none is waited for
            process.terminate()


def _start() -> None:
    """In a new worker. The parent alone hears Ctrl-C; a worker whose parent was killed ends, too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    quiet()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def quiet(threads: int | None = 1) -> None:
    """So many threads, or torch's own number; no messages of transformers."""
    import torch
    from transformers.utils import logging

    if threads is not None:
        torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def drive(
    plans: dict[Any, Plan],
    file: ResultsFile,
    submit: Submit,
    told: Callable[[Job, Result | Exception], None],
) -> None:
    """Carry out all plans, their jobs side by side; what the file holds already is not run again, what comes new is
    written to it at once. `told` hears of every job that ended. A plan with a failed job goes no further."""
    waiting: dict[Future[Result], tuple[Any, int]] = {}
    rounds: dict[Any, list[Result | Exception | None]] = {}
    jobs: dict[tuple[Any, int], Job] = {}

    def ended(name: Any, place: int, outcome: Result | Exception) -> None:
        rounds[name][place] = outcome
        told(jobs[name, place], outcome)

    def give(name: Any, results: list[Result] | None) -> None:
        try:
            batch = next(plans[name]) if results is None else plans[name].send(results)
        except StopIteration:
            return
        rounds[name] = [None] * len(batch)
        for place, job in enumerate(batch):
            jobs[name, place] = job
            known = file.known(job, "run")
            if known is not None and isinstance(known.outcome, Result):
                ended(name, place, known.outcome)
            else:
                try:
                    waiting[submit(job, file.unfinished(job))] = (name, place)
                except BrokenProcessPool as error:  # one of the processes was killed: what is finished is kept
                    ended(name, place, error)
        advance(name)

    def advance(name: Any) -> None:
        outcomes = rounds[name]
        if None in outcomes:
            return
        if not any(isinstance(outcome, Exception) for outcome in outcomes):
            give(name, [outcome for outcome in outcomes if isinstance(outcome, Result)])

    for name in plans:
        give(name, None)
    while waiting:
        done, _ = wait(waiting, return_when=FIRST_COMPLETED)
        for future in [future for future in waiting if future in done]:  # in the order in which they were begun
            name, place = waiting.pop(future)
            job, error = jobs[name, place], future.exception()
            if error is None:
                file.append(job, future.result())
                ended(name, place, future.result())
            else:
                ended(name, place, error if isinstance(error, Exception) else RuntimeError(repr(error)))
            advance(name)
