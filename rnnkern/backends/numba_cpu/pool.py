"""Threads of our own, for sweeps where torch's cannot be had (team.py): as many as there are shares, made anew after a
fork and when more are wanted."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

_lock = threading.Lock()
_executor: ThreadPoolExecutor | None = None
_width = 0


def _forget() -> None:
    """A forked child inherits the pool but none of its threads, and a lock that another thread may have held."""
    global _lock, _executor, _width
    _lock, _executor, _width = threading.Lock(), None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _submit(tasks: Sequence[Callable[[], None]]) -> list[Future[None]]:
    """Hands the tasks to the pool, grown first if need be; under the lock, so that nobody replaces it in between."""
    global _executor, _width
    with _lock:
        if _executor is None or _width < len(tasks):
            if _executor is not None:
                _executor.shutdown(wait=False)  # what it was given still runs to its end
            _executor, _width = ThreadPoolExecutor(len(tasks), thread_name_prefix="rnnkern"), len(tasks)
        return [_start(_executor, task) for task in tasks]


def _start(executor: ThreadPoolExecutor, task: Callable[[], None]) -> Future[None]:
    try:
        return executor.submit(task)
    except RuntimeError:  # the interpreter is shutting down: a thread that outlives the main one does the work itself
        future: Future[None] = Future()
        task()
        future.set_result(None)
        return future


def run(tasks: Sequence[Callable[[], None]]) -> None:
    """Runs all tasks, the first on the calling thread, and returns when all have ended; raises the first error."""
    if not tasks:
        return
    first, *others = tasks
    futures = _submit(others) if others else []
    try:
        first()
    finally:
        wait(futures)
    for future in futures:
        future.result()
