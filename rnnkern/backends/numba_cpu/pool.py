"""The threads that run sweeps: as wide as torch's own setting, made anew after a fork and when that setting grows.

Each task is a whole sweep over its share of the batch, so threads meet once, at the end. Numba's own parallel layers
are not used: its workqueue aborts the process on concurrent calls, and its OpenMP layer kills forked children.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

_lock = threading.Lock()
_executor: ThreadPoolExecutor | None = None
_width = 0


def _forget() -> None:
    """A forked child inherits the pool but none of its threads, and a lock that another thread may have held."""
    global _lock, _executor, _width
    _lock, _executor, _width = threading.Lock(), None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _threads(count: int) -> ThreadPoolExecutor:
    global _executor, _width
    with _lock:
        if _executor is None or _width < count:
            if _executor is not None:
                _executor.shutdown(wait=False)  # what it was given still runs to its end
            _executor, _width = ThreadPoolExecutor(count, thread_name_prefix="rnnkern"), count
        return _executor


def run(tasks: Sequence[Callable[[], None]]) -> None:
    """Runs all tasks, the first on the calling thread, and returns when all have ended; raises the first error."""
    first, *others = tasks
    futures = [_threads(len(others)).submit(task) for task in others] if others else []
    try:
        first()
    finally:
        for future in futures:
            future.result()
