"""Compiles csrc/ with ninja: by nvcc into the extension rnnkern._cuda, for setup.py; and by g++ into the module _host,
which runs the same kernels on the CPU, for the tests. Only what was touched is compiled again. No torch is needed:
calls_build.py compiles what is for torch.

The environment says what setup.py builds:

RNNKERN_CUDA        auto, the default: CUDA where there is a compiler for it, else the pure package; 0: the pure
                    package; 1: CUDA or an error; wheel: CUDA, by NVIDIA's compiler wheels, which pip installs for
                    the build alone
CUDA_HOME           the toolkit to take; without it the nvcc on PATH is taken, then the one in /usr/local/cuda
RNNKERN_CUDA_ARCHS  what to compile for, separated by semicolons: N is machine code for compute capability N (80 for
                    8.0), N+PTX is PTX alone, which the driver compiles for every GPU from N on
RNNKERN_WERROR      1: a warning is an error, as in .ci/run
"""

import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).resolve().parent
ROOT = SOURCE.parent

PRECISIONS = ("float32", "float64", "tf32", "bfloat16", "float16")
SWEEPS = ("backward", "forward", "reset_before")  # compiled once for every precision; what takes longest comes first
OTHER_KERNELS = ("selftest",)

# sm_90a runs on every GPU of 9.0, and on no newer one: those compile the PTX, which does without what only 9.0 has.
DEFAULT_ARCHS = "80;90a;90+PTX"
OLDEST_ARCH = 80  # cp.async and the tensor cores' bfloat16
OLDEST_NVCC = 12
DEFAULT_HOME = Path("/usr/local/cuda")
# What RNNKERN_CUDA=wheel compiles with: parts of one toolkit, so they are pinned together.
CUDA_WHEELS = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
]
WHEEL_HOME = Path("nvidia", "cu13")  # in site-packages

# Whoever installs may have a compiler that warns of what ours do not.
STRICT = os.environ.get("RNNKERN_WERROR") == "1"
CXX_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", *(["-Werror"] if STRICT else [])]
NVCC_FLAGS = [
    *("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", *(["-Werror=all-warnings"] if STRICT else [])),
    "-Xptxas=-v",  # registers and spills of each kernel, which tests/test_kernel_resources.py reads
]
# The tests' builds are run for a short time: most of it is compilation, which takes half as long with less optimisation
# (under a sanitizer a third, with none). `#pragma unroll` means nothing to g++.
HOST_FLAGS = ["-O1", "-g1", "-DRNNKERN_HOST", "-Wno-unknown-pragmas"]
SANITIZER_FLAGS = {
    None: [],
    "address": ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-O0", "-fsanitize=thread"],
}

# The file beside rnnkern/__init__.py in which the last build says what it did, for `python -m rnnkern`. Its fields:
#   cuda     whether the extension was built
#   reason   why not, a sentence, else null
#   nvcc     the version of the compiler, like "13.0.88", else null
#   targets  what it compiled for, like ["sm_80", "sm_90a", "compute_90"], else []
RECORD = "_cuda_build.json"

RULES = """\
ninja_required_version = 1.10
rule gxx
  command = g++ $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = g++ $out
rule nvcc
  command = $nvcc $flags -MMD -MF $out.d -c $in -o $out 2> $out.ptxas || { cat $out.ptxas >&2; exit 1; }
  depfile = $out.d
  deps = gcc
  description = nvcc $out
rule link
  command = g++ -shared -o $out $in $libraries
  description = link $out
"""


class BuildError(RuntimeError):
    """A sentence for whoever builds: what is missing or wrong, and what to do."""


class Toolkit(NamedTuple):
    """A CUDA toolkit that can compile csrc/."""

    nvcc: Path  # may be a script that calls the toolkit's own
    version: str  # of nvcc, like "13.0.88"
    include: Path
    runtime: Path  # libcudart_static.a


class Compilation(NamedTuple):
    """One object file."""

    rule: str  # "gxx" or "nvcc"
    source: Path
    output: str  # in the build folder
    flags: Sequence[str]


def cuda_mode() -> str:
    """What RNNKERN_CUDA asks for."""
    return mode_of("RNNKERN_CUDA", "auto", "0", "1", "wheel")


def mode_of(variable: str, usual: str, *others: str) -> str:
    """What an environment variable asks for."""
    mode = os.environ.get(variable) or usual
    if mode not in (usual, *others):
        raise BuildError(f"{variable}: expected {', '.join((usual, *others[:-1]))} or {others[-1]}, got {mode!r}")
    return mode


def targets() -> list[str]:
    """What RNNKERN_CUDA_ARCHS asks for, in nvcc's names: sm_N is machine code, compute_N is PTX."""
    text = os.environ.get("RNNKERN_CUDA_ARCHS") or DEFAULT_ARCHS
    names = []
    for arch in text.split(";"):
        match = re.fullmatch(r"((\d+)[af]?)(\+PTX)?", arch.strip())
        if match is None:
            raise BuildError(
                f"RNNKERN_CUDA_ARCHS: expected compute capabilities like {DEFAULT_ARCHS!r}, got {arch!r} in {text!r}"
            )
        if int(match[2]) < OLDEST_ARCH:
            raise BuildError(f"RNNKERN_CUDA_ARCHS: the kernels need compute capability 8.0 (80) or newer, got {arch!r}")
        names.append(f"compute_{match[1]}" if match[3] else f"sm_{match[1]}")
    return names


def require_gxx() -> None:
    """Refuses to go on without g++. It compiles all but the kernels, and those too for the host; nvcc calls it."""
    if shutil.which("g++") is None:
        raise BuildError("no g++ was found on PATH: install it (on Debian and Ubuntu: apt install g++)")


def find_ninja() -> Path:
    """The program, from this Python's environment, active or not, or from PATH."""
    folders = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
    found = shutil.which("ninja", path=os.pathsep.join(folders))
    if found is None:
        raise BuildError("no ninja was found on PATH: pip install ninja")
    return Path(found)


def find_nvcc() -> Path:
    """The nvcc that the environment names, or one in the usual places."""
    if cuda_mode() == "wheel":
        return _wheel_nvcc()
    home = os.environ.get("CUDA_HOME")
    if home:
        nvcc = Path(home) / "bin" / "nvcc"
        if not nvcc.is_file():
            raise BuildError(f"CUDA_HOME is {home}, which has no bin/nvcc: set it to a CUDA toolkit, or unset it")
        return nvcc
    on_path = shutil.which("nvcc") or shutil.which(DEFAULT_HOME / "bin" / "nvcc")
    if on_path is None:
        raise BuildError(
            f"no nvcc was found on PATH or in {DEFAULT_HOME}: install a CUDA toolkit, set CUDA_HOME to where it is, "
            "or build with RNNKERN_CUDA=wheel"
        )
    return Path(on_path)


def _wheel_nvcc() -> Path:
    for folder in sys.path:
        nvcc = Path(folder) / WHEEL_HOME / "bin" / "nvcc"
        if nvcc.is_file():
            return nvcc
    raise BuildError(f"RNNKERN_CUDA=wheel found no nvcc: without build isolation, pip install {' '.join(CUDA_WHEELS)}")


def find_toolkit() -> Toolkit:
    """The toolkit to compile with; a BuildError says why there is none."""
    if cuda_mode() == "0":
        raise BuildError("RNNKERN_CUDA=0 was set for the build")
    nvcc = find_nvcc()
    require_gxx()
    version = _ask(nvcc, r"\bV(\d+\.[.\d]+)", "--version")
    if int(version.split(".")[0]) < OLDEST_NVCC:
        raise BuildError(f"{nvcc} is nvcc {version}, and {OLDEST_NVCC}.0 is the oldest that can compile the kernels")
    # nvcc may be a script somewhere else; the real one says where it lives.
    root = Path(_ask(nvcc, r"(?m)^#\$ TOP=(.+)$", "-dryrun", "-x", "cu", os.devnull)).resolve()
    for folder in (root / "lib64", root / "lib", *sorted(root.glob("targets/*/lib"))):
        runtime = folder / "libcudart_static.a"
        if runtime.is_file():
            return Toolkit(nvcc, version, root / "include", runtime)
    raise BuildError(f"the CUDA toolkit in {root} has no libcudart_static.a: install its runtime for development")


def _ask(nvcc: Path, pattern: str, *arguments: str) -> str:
    """What the pattern's group finds in nvcc's answer."""
    try:
        done = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{nvcc} cannot be run: {error.strerror}") from error
    answer = done.stdout + done.stderr
    match = re.search(pattern, answer)
    if done.returncode != 0 or match is None:
        last = (answer.strip() or "nothing").splitlines()[-1]
        raise BuildError(f"{nvcc} {arguments[0]} does not answer as a CUDA compiler: it says {last!r}")
    return match[1].strip()


def write_record(package: Path, reason: str | None) -> None:
    """Leaves in `package` what the build did; `reason` is why it compiled nothing, None if it compiled."""
    toolkit = find_toolkit() if reason is None else None
    record = {
        "cuda": toolkit is not None,
        "reason": reason,
        "nvcc": toolkit.version if toolkit else None,
        "targets": targets() if toolkit else [],
    }
    (package / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def kernel_compilations(
    rule: str, flags: Sequence[str], source: Path, precisions: Sequence[str] = PRECISIONS
) -> list[Compilation]:
    """Every object file with kernels in it."""
    compilations = []
    for name in SWEEPS:
        for precision in precisions:
            defined = [f"-DRNNKERN_PRECISION={precision}", *flags]
            compilations.append(Compilation(rule, source / f"{name}.cu", f"{name}.{precision}.o", defined))
    return compilations + [Compilation(rule, source / f"{name}.cu", f"{name}.o", flags) for name in OTHER_KERNELS]


def python_headers() -> Path:
    """The folder of Python.h."""
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").is_file():
        raise BuildError(f"{python} has no Python.h: install Python's headers (on Debian and Ubuntu: python3-dev)")
    return python


def _bindings(module: str, flags: Sequence[str], source: Path, precisions: Sequence[str] = PRECISIONS) -> Compilation:
    try:
        import pybind11
    except ImportError:
        raise BuildError("pybind11 is not installed: pip install pybind11") from None
    includes = ["-isystem", str(python_headers()), "-isystem", pybind11.get_include()]
    table = f"-DRNNKERN_PRECISIONS(X)={' '.join(f'X({name})' for name in precisions)}"
    defined = [f"-DRNNKERN_MODULE={module}", table]
    return Compilation("gxx", source / "bindings.cpp", "bindings.o", [*defined, *includes, *flags])


def module_file(module: str) -> str:
    """The file that `import` finds, for this Python."""
    return f"{module}{sysconfig.get_config_var('EXT_SUFFIX')}"


def ninja_file(compilations: Sequence[Compilation], module: str, libraries: Sequence[str], nvcc: Path | None) -> str:
    """What ninja reads: the rules, each compilation, and the link of all into the module."""
    lines = [f"nvcc = {_in_command([str(nvcc)])}"] if nvcc else []
    lines.append(RULES)
    for step in compilations:
        lines.append(f"build {step.output}: {step.rule} {_in_path(step.source)}")
        lines.append(f"  flags = {_in_command(step.flags)}")
    lines.append(f"build {module_file(module)}: link {' '.join(step.output for step in compilations)}")
    lines.append(f"  libraries = {_in_command(libraries)}")
    return "\n".join(lines) + "\n"


def _in_command(words: Sequence[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _in_path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder, and keeps other processes from building in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run_ninja(folder: Path, text: str, goals: Sequence[str]) -> None:
    """Brings the goals, files in the folder, up to date."""
    ninja = find_ninja()
    with locked(folder):
        (folder / "build.ninja").write_text(text)
        if subprocess.run([ninja, "-C", folder, *goals], check=False).returncode != 0:
            raise BuildError(f"ninja could not build {' '.join(goals)} in {folder}: what it printed says why")


def cuda_folder(toolkit: Toolkit) -> Path:
    """Where the objects live, apart for each version of nvcc: ninja would not see that another has taken its path."""
    return ROOT / "build" / f"cuda-{toolkit.version}"


def _cuda_build(toolkit: Toolkit) -> tuple[list[Compilation], str]:
    codes = [f"-gencode=arch=compute_{name.split('_')[1]},code={name}" for name in targets()]
    kernels = kernel_compilations("nvcc", [*NVCC_FLAGS, *codes], SOURCE)
    bindings = _bindings("_cuda", [*CXX_FLAGS, "-isystem", str(toolkit.include)], SOURCE)
    # The runtime's symbols stay inside: another library in the process, torch's, has its own.
    libraries = [str(toolkit.runtime), "-Wl,--exclude-libs,ALL", "-ldl", "-lrt", "-lpthread"]
    return kernels, ninja_file([*kernels, bindings], "_cuda", libraries, toolkit.nvcc)


def build_kernels(folder: Path, toolkit: Toolkit) -> list[Path]:
    """Compiles the kernels alone, and gives for each object what ptxas said of its kernels."""
    kernels, text = _cuda_build(toolkit)
    outputs = [step.output for step in kernels]
    run_ninja(folder, text, outputs)
    return [folder / f"{output}.ptxas" for output in outputs]


def build_cuda(toolkit: Toolkit) -> Path:
    """Compiles the extension module _cuda, and gives the file."""
    folder = cuda_folder(toolkit)
    run_ninja(folder, _cuda_build(toolkit)[1], [module_file("_cuda")])
    return folder / module_file("_cuda")


def build_host(
    folder: Path, sanitizer: str | None = None, source: Path = SOURCE, precisions: Sequence[str] = PRECISIONS
) -> Path:
    """Compiles the module _host and gives the file: its kernels with the sanitizers "address" (and undefined behaviour)
    or "thread", or with none, in a subfolder for each."""
    require_gxx()
    common = [*CXX_FLAGS, *HOST_FLAGS, "-I", str(source / "host")]
    flags = [*common, *SANITIZER_FLAGS[sanitizer], "-x", "c++"]
    compilations = kernel_compilations("gxx", flags, source, precisions)
    compilations.append(_bindings("_host", common, source, precisions))
    for path in sorted((source / "host").glob("*.cpp")):  # the emulator, which steers the sanitizers itself
        compilations.append(Compilation("gxx", path, f"{path.stem}.o", common))
    folder = folder / (sanitizer or "plain")
    run_ninja(folder, ninja_file(compilations, "_host", SANITIZER_FLAGS[sanitizer], nvcc=None), [module_file("_host")])
    return folder / module_file("_host")
