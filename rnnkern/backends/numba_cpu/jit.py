"""How kernels are compiled and cached.

Numba's cache of a kernel looks at the kernel's own file alone: an edit to a file it imports would be answered by the
old machine code. So the cache folder carries a hash of every source here and of Numba's version. Kernels are
module-level functions, since a closure misses the cache. With nothing writable, kernels are compiled anew in each
process, which is said once.
"""

import hashlib
import logging
import os
import pickle
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import llvmlite
import numba
from numba.core.caching import NullCache


def _source_hash() -> str:
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__} {sys.version}".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def cache_root() -> Path:
    """RNNKERN_CACHE_DIR, or rnnkern in the user's cache folder."""
    if named := os.environ.get("RNNKERN_CACHE_DIR"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "rnnkern"


def _usable_folder() -> Path | None:
    """The folder for this version of the kernels, made if need be; None, with a warning, where it cannot be written."""
    folder = cache_root() / f"numba-{_source_hash()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        warnings.warn(
            f"rnnkern: the kernel cache {folder} is not writable ({error}), so each process compiles its kernels anew; "
            "set RNNKERN_CACHE_DIR to a folder that is",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return folder


CACHE_FOLDER = _usable_folder()

# fmuladd is written where it is wanted, and no other rewriting of floating-point code is allowed: NaN, infinities and
# order are kept.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}

# What only other compiled code calls needs no entry from Python or C: those took a third of the time to compile.
_INNER = {**_OPTIONS, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
# Inlined by LLVM: for short functions.
inlined: Callable[..., Any] = numba.njit(forceinline=True, **_INNER)
# Inlined by Numba before it types the kernel: for the parts of a sweep. Numba optimises each function together with all
# that it calls, so a chain of functions around the tile would compile the tile's code once for every link.
woven: Callable[..., Any] = numba.njit(inline="always", **_INNER)
# For code so large that one copy of it in a kernel is enough.
shared: Callable[..., Any] = numba.njit(**_INNER)


def kernel(function: Callable[..., Any]) -> Any:
    """Decorates an entry point from Python and from C: compiled at its first call, without the GIL, kept in the cache
    folder."""
    dispatcher = numba.njit(**_OPTIONS)(function)
    if CACHE_FOLDER is not None:
        before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(CACHE_FOLDER)
        try:
            dispatcher.enable_caching()
        finally:
            numba.config.CACHE_DIR = before
    return dispatcher


def constants(**values: Any) -> ModuleType:
    """What is compiled into a kernel: a module, since that is where Numba takes functions from as constants."""
    found = ModuleType("constants")
    vars(found).update(values)
    return found


def kernel_for(cell: ModuleType, function: Callable[..., Any], name: str) -> Any:
    """A kernel of that name: the function with the constants `cell` in place of its module's CELL.

    As arguments of a sweep that is woven into a kernel for each cell they would cost up to a third of the time to
    compile: Numba copies the whole text of what it weaves in, twice."""
    own = FunctionType(function.__code__, {**function.__globals__, "CELL": cell}, name)
    own.__qualname__ = name  # by which the cache tells kernels of one function
    return kernel(own)


_log = logging.getLogger("rnnkern")
SLOW_COMPILE_SECONDS = 2.0
_compiled: set[tuple[Any, type]] = set()
_addresses: dict[tuple[Any, type], int] = {}
_compile_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # a fork waits for a compilation under way: its child would inherit the lock held
    os.register_at_fork(
        before=_compile_lock.acquire, after_in_parent=_compile_lock.release, after_in_child=_compile_lock.release
    )


def _signature(integers: int, zero: Any) -> tuple[Any, ...]:
    return (*[numba.typeof(0)] * integers, *([] if zero is None else [numba.typeof(zero)]))


def ready(dispatcher: Any, integers: int, zero: Any = None) -> Any:
    """The kernel, compiled for so many integers and a zero of the wanted dtype, or loaded from the cache; a long
    compilation is told."""
    key = (dispatcher, type(zero))
    if key not in _compiled:
        with _compile_lock:
            start = time.perf_counter()
            _compile(dispatcher, _signature(integers, zero))
            seconds = time.perf_counter() - start
        if seconds > SLOW_COMPILE_SECONDS:
            kept = f"kept in {CACHE_FOLDER}" if CACHE_FOLDER else "not kept: no cache folder is writable"
            name = dispatcher.py_func.__name__ + ("" if zero is None else f" for {type(zero).__name__}")
            _log.warning("rnnkern: compiled %s in %.1f s, once; %s", name, seconds, kept)
        _compiled.add(key)
    return dispatcher


def address(dispatcher: Any, integers: int, zero: Any = None) -> int:
    """Where the same kernel begins, as C calls it."""
    key = (dispatcher, type(zero))
    found = _addresses.get(key)
    if found is None:
        compiled = ready(dispatcher, integers, zero).overloads[_signature(integers, zero)]
        name = compiled.fndesc.llvm_cfunc_wrapper_name
        found = _addresses[key] = compiled.library.get_pointer_to_function(name)
    return found


def _compile(dispatcher: Any, signature: tuple[Any, ...]) -> None:
    """Compiles or loads a kernel; without the cache, as a warning says, where that cannot be read or written."""
    try:
        dispatcher.compile(signature)
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        warnings.warn(
            f"rnnkern: the kernel cache {CACHE_FOLDER} failed ({type(error).__name__}: {error}), so this process "
            "compiles without it; make room there, or delete the folder",
            RuntimeWarning,
            stacklevel=2,
        )
        dispatcher._cache = NullCache()
        dispatcher.compile(signature)
