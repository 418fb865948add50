"""A small library of the self-tests and the defects, compiled for the host: builds it, loads it, and, run as a program,
calls what it is told to, so that a test can put a sanitizer in front of it."""

import ctypes
import subprocess
import sys
from pathlib import Path

from csrc import build

HERE = Path(__file__).parent
INCLUDES = [f"-I{folder}" for folder in (build.SOURCE, build.SOURCE / "host", HERE)]
FLAGS = [*build.CXX_FLAGS, *build.HOST_FLAGS, *INCLUDES]
NUMBERS = 256  # kNumbers of defects.h
LARGEST_BYTES = 1 << 16  # of what a self-test reads or writes


class Library:
    """The functions of entry.cpp; what goes wrong is raised, as the module _host does."""

    def __init__(self, file: Path) -> None:
        self._library = ctypes.CDLL(str(file))
        self._library.run_selftest.restype = ctypes.c_char_p
        self._library.run_defect.restype = ctypes.c_char_p

    def set_schedule(self, seed: int) -> None:
        self._library.set_schedule(ctypes.c_uint(seed))

    def selftest(self, name: str, source: int, target: int, stream: int) -> None:
        assert stream == 0, "the host has no streams"
        _raise(self._library.run_selftest(name.encode(), ctypes.c_void_p(source), ctypes.c_void_p(target)))

    def defect(self, name: str, numbers: int) -> None:
        _raise(self._library.run_defect(name.encode(), ctypes.c_void_p(numbers)))


def _raise(text: bytes | None) -> None:
    if text is not None:
        raise RuntimeError(text.decode())


def build_library(folder: Path, sanitizer: str | None = None) -> Path:
    """Compiles the kernels with the sanitizer, and the emulator always without."""
    objects = [emulator_object(source, folder) for source in sorted((build.SOURCE / "host").glob("*.cpp"))]
    sources = [build.SOURCE / "selftest.cu", HERE / "defects.cu", HERE / "entry.cpp"]
    library = folder / f"{sanitizer or 'plain'}.so"
    flags = [*FLAGS, *build.SANITIZER_FLAGS[sanitizer]]
    gxx("-shared", *flags, "-x", "c++", *sources, "-x", "none", *objects, "-o", library)
    return library


def emulator_object(source: Path, folder: Path) -> Path:
    """Compiles a source of the emulator, unless that has been done."""
    compiled = folder / f"{source.stem}.o"
    if not compiled.exists():
        gxx(*FLAGS, "-c", source, "-o", compiled)
    return compiled


def gxx(*arguments: str | Path) -> None:
    subprocess.run(["g++", *arguments], check=True)


def main(file: str, seeds: str, *names: str) -> None:
    """Calls each under each schedule, a digit: self-tests, and defects, whose names begin with a minus."""
    library = Library(Path(file))
    for seed in seeds:
        library.set_schedule(int(seed))
        for name in names:
            report(library, name)


def report(library: Library, name: str) -> None:
    """Prints what goes wrong, if anything does."""
    source, target = (ctypes.create_string_buffer(LARGEST_BYTES) for _ in range(2))
    numbers = (ctypes.c_float * NUMBERS)()
    try:
        if name.startswith("-"):
            library.defect(name[1:], ctypes.addressof(numbers))
        else:
            library.selftest(name, ctypes.addressof(source), ctypes.addressof(target), 0)
    except RuntimeError as error:
        print(f"{name}: {error}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
