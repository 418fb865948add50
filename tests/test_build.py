"""How csrc/ is built: which compiler, for which GPUs, what is refused and in which words; and that only what was
touched is compiled again. Compilers of CUDA are scripts here, but in the slow test."""

import ctypes
import json
import os
import re
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from csrc import build, calls_build
from tests.build_support import executable, python, recompiled

MEGABYTE = 2**20


def nvcc_script(version: str, top: str) -> str:
    """A script that answers as nvcc does when it is asked for its version and its toolkit."""
    return f"""#!/bin/sh
case "$1" in
    --version) echo 'Cuda compilation tools, release {version[:4]}, {version}' ;;
    -dryrun) echo '#$ _HERE_=/elsewhere' >&2; echo '#$ {top}' >&2 ;;
    *) exit 1 ;;
esac
"""


def fake_toolkit(home: Path, version: str = "13.0.88", nvcc: Path | None = None, library: str = "lib64") -> Path:
    """A folder like a CUDA toolkit's, with a script for nvcc: in it, or at `nvcc` as a wrapper script would be."""
    (home / library).mkdir(parents=True)
    (home / library / "libcudart_static.a").touch()
    (home / "bin").mkdir()
    return executable(nvcc or home / "bin" / "nvcc", nvcc_script(f"V{version}", f"TOP={home}/bin/.."))


# -- which compiler ----------------------------------------------------------------------------------------------------


def test_cuda_home_goes_before_path_and_path_before_the_usual_place(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = fake_toolkit(tmp_path / "default", "12.0.1")
    assert build.find_toolkit()[:2] == (usual, "12.0.1")
    on_path = fake_toolkit(tmp_path / "other", "12.9.1", nvcc=bare / "nvcc")
    assert build.find_toolkit()[:2] == (on_path, "12.9.1")
    named = fake_toolkit(tmp_path / "named", "13.0.88")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "named"))
    assert build.find_toolkit()[:2] == (named, "13.0.88")


@pytest.mark.parametrize("library", ["lib64", "lib", "targets/sbsa-linux/lib"])
def test_a_wrapper_script_is_followed_to_its_toolkit(bare: Path, tmp_path: Path, library: str) -> None:
    home = tmp_path / "cuda-13.0"
    wrapper = fake_toolkit(home, nvcc=bare / "nvcc", library=library)
    assert build.find_toolkit() == (wrapper, "13.0.88", home / "include", home / library / "libcudart_static.a")


def test_wheel_takes_the_compiler_from_site_packages_only(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_toolkit(tmp_path / "cuda", "12.0.1", nvcc=bare / "nvcc")
    monkeypatch.setenv("RNNKERN_CUDA", "wheel")
    with pytest.raises(build.BuildError, match=r"RNNKERN_CUDA=wheel found no nvcc: .*pip install nvidia-cuda-nvcc=="):
        build.find_toolkit()
    site = tmp_path / "site-packages"
    nvcc = fake_toolkit(site / build.WHEEL_HOME, library="lib")
    monkeypatch.syspath_prepend(str(site))
    assert build.find_toolkit()[:2] == (nvcc, "13.0.88")


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_why_there_is_no_compiler(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reason() -> str:
        with pytest.raises(build.BuildError) as caught:
            build.find_toolkit()
        return str(caught.value)

    assert reason() == (
        f"no nvcc was found on PATH or in {tmp_path}/default: install a CUDA toolkit, set CUDA_HOME to where it is, "
        "or build with RNNKERN_CUDA=wheel"
    )
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert reason().startswith(f"CUDA_HOME is {tmp_path}/nowhere, which has no bin/nvcc")
    monkeypatch.setenv("RNNKERN_CUDA", "0")
    assert reason() == "RNNKERN_CUDA=0 was set for the build"
    monkeypatch.setenv("RNNKERN_CUDA", "yes")
    assert reason() == "RNNKERN_CUDA: expected auto, 0, 1 or wheel, got 'yes'"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (nvcc_script("V11.8.89", "TOP=/x"), "is nvcc 11.8.89, and 12.0 is the oldest"),
        (nvcc_script("", "TOP=/x"), "--version does not answer as a CUDA compiler: it says 'Cuda compilation tools"),
        (nvcc_script("V13.0.88", "TO="), "-dryrun does not answer as a CUDA compiler: it says '#$ TO='"),
        (nvcc_script("V13.0.88", "TOP=/x"), "in /x has no libcudart_static.a"),
        ("#!/bin/sh\necho first >&2\necho broken >&2\nexit 1\n", "not answer as a CUDA compiler: it says 'broken'"),
        ("#!/no/such/shell\n", "cannot be run: No such file or directory"),
    ],
    ids=["too old", "no version", "no toolkit", "no runtime", "broken", "not a program"],
)
def test_a_compiler_that_will_not_do_is_refused(bare: Path, text: str, reason: str) -> None:
    executable(bare / "nvcc", text)
    with pytest.raises(build.BuildError, match=re.escape(reason)):
        build.find_toolkit()


def test_missing_programs_and_headers_are_named(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {"scripts": str(tmp_path), "include": str(tmp_path)}
    monkeypatch.setattr("sysconfig.get_path", paths.__getitem__)
    monkeypatch.setenv("PATH", str(tmp_path))
    fake_toolkit(tmp_path / "default")
    with pytest.raises(build.BuildError, match=r"^no g\+\+ was found on PATH: .*apt install g\+\+"):
        build.find_toolkit()
    with pytest.raises(build.BuildError, match=r"^no ninja was found on PATH: pip install ninja"):
        build.run_ninja(tmp_path, "", [])
    executable(tmp_path / "g++", "")
    with pytest.raises(build.BuildError, match=r"has no Python\.h: .*python3-dev"):
        build.build_host(tmp_path)
    monkeypatch.setitem(sys.modules, "pybind11", None)
    with pytest.raises(build.BuildError, match=r"^pybind11 is not installed: pip install pybind11"):
        build.build_host(tmp_path)


# -- for which GPUs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ["sm_80", "sm_90a", "compute_90"]),
        ("80", ["sm_80"]),
        ("86; 120f ;100a;80+PTX", ["sm_86", "sm_120f", "sm_100a", "compute_80"]),
    ],
)
def test_architectures(text: str, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RNNKERN_CUDA_ARCHS", text)
    assert build.targets() == names


@pytest.mark.parametrize("text", ["sm_80", "9.0", "80,90", "80;", "90 PTX", "native"])
def test_other_ways_to_write_architectures_are_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RNNKERN_CUDA_ARCHS", text)
    with pytest.raises(build.BuildError, match=r"expected compute capabilities like '80;90a;90\+PTX', got '"):
        build.targets()


def test_gpus_without_the_instructions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RNNKERN_CUDA_ARCHS", "80;75")
    with pytest.raises(build.BuildError, match=r"need compute capability 8\.0 \(80\) or newer, got '75'"):
        build.targets()


# -- what ninja is told ------------------------------------------------------------------------------------------------


def test_every_precision_has_its_objects_and_all_are_linked() -> None:
    source = Path("/some where/$csrc")
    compilations = build.kernel_compilations("nvcc", ["-O3", "-DX=a b"], source)
    text = build.ninja_file(compilations, "_cuda", ["/a b/libcudart_static.a"], Path("/cu da/nvcc"))
    outputs = [f"{sweep}.{precision}.o" for sweep in build.SWEEPS for precision in build.PRECISIONS]
    assert [step.output for step in compilations] == [*outputs, "selftest.o"]
    assert "nvcc = '/cu da/nvcc'\n" in text
    step = "build backward.tf32.o: nvcc /some$ where/$$csrc/backward.cu\n"
    assert f"{step}  flags = -DRNNKERN_PRECISION=tf32 -O3 '-DX=a b'\n" in text
    assert f"build {build.module_file('_cuda')}: link {' '.join(outputs)} selftest.o\n" in text
    assert "  libraries = '/a b/libcudart_static.a'\n" in text


# -- setup.py ----------------------------------------------------------------------------------------------------------


def test_without_a_compiler_the_pure_package_is_built_and_says_why(tree: Path) -> None:
    done = python(tree, "setup.py", "-q", "bdist_wheel")
    assert done.returncode == 0, done.stderr
    reason = f"CUDA_HOME is {tree}/nowhere, which has no bin/nvcc: set it to a CUDA toolkit, or unset it"
    assert f"rnnkern: without CUDA: {reason}\n" in done.stderr
    (wheel,) = (tree / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        record = json.loads(archive.read(f"rnnkern/{build.RECORD}"))
        of_calls = json.loads(archive.read(f"rnnkern/{calls_build.RECORD}"))
    assert record == {"cuda": False, "reason": reason, "nvcc": None, "targets": []}
    assert of_calls == {"torch": None, "reason": "RNNKERN_CALLS=0 was set for the build"}
    assert f"rnnkern: without calls in C++: {of_calls['reason']}\n" in done.stderr


def test_zero_builds_the_pure_package_where_there_is_a_compiler_and_removes_an_old_extension(tree: Path) -> None:
    fake_toolkit(tree / "cuda")
    extensions = [tree / "rnnkern" / build.module_file(name) for name in ("_cuda", "_calls")]
    for extension in extensions:
        extension.touch()
    done = python(tree, "setup.py", "-q", "build_ext", "--inplace", RNNKERN_CUDA="0", CUDA_HOME=str(tree / "cuda"))
    assert done.returncode == 0, done.stderr
    assert not any(extension.exists() for extension in extensions)
    record = json.loads((tree / "rnnkern" / build.RECORD).read_text())
    assert record["reason"] == "RNNKERN_CUDA=0 was set for the build"


def test_one_without_a_compiler_fails_with_a_sentence(tree: Path) -> None:
    done = python(tree, "setup.py", "-q", "build_ext", "--inplace", RNNKERN_CUDA="1")
    assert done.returncode == 1
    assert done.stderr == (
        f"rnnkern: RNNKERN_CUDA=1, but CUDA_HOME is {tree}/nowhere, which has no bin/nvcc: set it to a CUDA toolkit, "
        "or unset it\n"
    )


def test_what_failed_to_compile_is_not_recorded_as_built(tree: Path) -> None:
    fake_toolkit(tree / "cuda")
    install = "from setuptools import build_meta; build_meta.build_editable('.')"
    done = python(tree, "-c", install, CUDA_HOME=str(tree / "cuda"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("rnnkern: ninja could not build _cuda.")
    assert not (tree / "rnnkern" / build.RECORD).exists()


@pytest.mark.parametrize(("mode", "more"), [("wheel", build.CUDA_WHEELS), ("auto", [])])
def test_pip_is_asked_for_the_compiler_wheels(tree: Path, mode: str, more: list[str]) -> None:
    ask = "from setuptools import build_meta; print(build_meta.get_requires_for_build_editable())"
    done = python(tree, "-c", ask, RNNKERN_CUDA=mode)
    assert done.stdout.splitlines()[-1:] == [str(more)], done.stderr


def test_a_source_distribution_can_be_built_from(tree: Path) -> None:
    done = python(tree, "setup.py", "-q", "sdist", "--formats=zip")
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "dist").iterdir()
    with zipfile.ZipFile(archive) as file:
        inside = {name.split("/", 1)[1] for name in file.namelist()}
    sources = {str(path.relative_to(tree)) for path in (tree / "csrc").rglob("*") if path.is_file()}
    assert {"setup.py", "csrc/build.py", *sources} <= inside


# -- what is compiled again --------------------------------------------------------------------------------------------


@pytest.fixture
def stub_sources(tmp_path: Path) -> Path:
    """Files with the names of the kernels', so small that g++ compiles them at once."""
    folder = tmp_path / "csrc"
    sources = {
        "shared.h": "#define ONE 1\n",
        "forward.cu": '#include "shared.h"\n#define NAME2(p) forward_##p\n#define NAME(p) NAME2(p)\n'
        'extern "C" int NAME(RNNKERN_PRECISION)() { return ONE; }\n',
        "backward.cu": "#define NAME2(p) backward_##p\n#define NAME(p) NAME2(p)\n"
        'extern "C" int NAME(RNNKERN_PRECISION)() { return 2; }\n',
        **{f"{sweep}.cu": "" for sweep in build.SWEEPS if sweep not in ("forward", "backward")},
        "selftest.cu": "#pragma unroll\n",
        "bindings.cpp": 'extern "C" int forward_tf32();\n'
        'extern "C" __attribute__((visibility("default"))) int total() { return 10 + forward_tf32(); }\n',
        "host/emulator.cpp": "#ifdef __SANITIZE_ADDRESS__\n#error the emulator is not for sanitizers\n#endif\n",
    }
    for name, text in sources.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_only_what_was_touched_is_compiled_again(stub_sources: Path, tmp_path: Path) -> None:
    def compile_all() -> Path:
        return build.build_host(tmp_path / "objects", source=stub_sources)

    folder = tmp_path / "objects" / "plain"
    others = ["selftest.o", "bindings.o", "emulator.o"]
    assert len(recompiled(folder, compile_all)) == len(build.SWEEPS) * len(build.PRECISIONS) + len(others)
    assert recompiled(folder, compile_all) == set()
    (stub_sources / "shared.h").write_text("#define ONE 5\n")
    assert recompiled(folder, compile_all) == {f"forward.{precision}.o" for precision in build.PRECISIONS}
    (stub_sources / "selftest.cu").touch()
    assert recompiled(folder, compile_all) == {"selftest.o"}
    assert ctypes.CDLL(str(compile_all())).total() == 15


def test_two_builds_at_once_wait_for_each_other(stub_sources: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        builds = [pool.submit(build.build_host, tmp_path / "objects", None, stub_sources) for _ in range(2)]
    first, second = (future.result() for future in builds)
    assert first == second
    assert ctypes.CDLL(str(first)).total() == 11


def test_sanitizers_reach_the_kernels_and_not_the_emulator(stub_sources: Path, tmp_path: Path) -> None:
    (stub_sources / "selftest.cu").write_text("#ifndef __SANITIZE_ADDRESS__\n#error no sanitizer\n#endif\n")
    module = build.build_host(tmp_path / "objects", "address", stub_sources)
    assert module == tmp_path / "objects" / "address" / build.module_file("_host")


def test_a_source_that_does_not_compile_is_an_error(
    stub_sources: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (stub_sources / "backward.cu").write_text("int unused() { int forgotten; return 0; }\n")
    with pytest.raises(build.BuildError, match=r"ninja could not build _host.*: what it printed says why"):
        build.build_host(tmp_path / "objects", source=stub_sources)
    assert "unused variable" in capfd.readouterr().out


# -- the real thing ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_extension_is_built_in_place_and_into_a_wheel(tree: Path) -> None:
    try:
        toolkit = build.find_toolkit()
    except build.BuildError as error:
        pytest.skip(str(error))
    environment = {"RNNKERN_CUDA": "1", "CUDA_HOME": os.environ.get("CUDA_HOME", "")}
    objects = tree / "build" / f"cuda-{toolkit.version}"

    def build_in_place() -> None:
        done = python(tree, "setup.py", "-q", "build_ext", "--inplace", **environment)
        assert done.returncode == 0, done.stdout + done.stderr

    assert len(recompiled(objects, build_in_place)) == 12
    (tree / "csrc" / "bindings.cpp").touch()
    assert recompiled(objects, build_in_place) == {"bindings.o"}

    module = tree / "rnnkern" / build.module_file("_cuda")
    assert module.stat().st_size < 40 * MEGABYTE
    dynamic = subprocess.run(["readelf", "--dynamic", module], capture_output=True, text=True, check=True).stdout
    assert not re.search("NEEDED.*(cuda|torch|python)", dynamic)
    done = python(module.parent, "-c", "import _cuda, sys; print('torch' in sys.modules)")
    assert done.stdout == "False\n", done.stderr

    command = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", "dist", "."]
    done = python(tree, *command, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tree / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        assert f"rnnkern/{module.name}" in archive.namelist()
        record = json.loads(archive.read(f"rnnkern/{build.RECORD}"))
    assert record == {"cuda": True, "reason": None, "nvcc": toolkit.version, "targets": build.targets()}
