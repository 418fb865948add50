"""Defects put into a copy of the source on purpose, each of which a named check of numba_mutant.py must see.

What is shown is that the comparisons the other tests make are sharp: a derivative, an edge or a bias that is wrong
does not pass. A mutation whose text is no longer in the source fails, so that the table follows the code.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import rnnkern
from tests.mutations import COMMON, FULL, Mutation

LIMIT = 1e-10  # of float64 sweeps over a few steps; without a mutation the error is about 1e-15

Check = Callable[[Path, str, str], float]


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Check]:
    """Runs a check on the copy of rnnkern in a folder; returns the error it found."""
    folder = tmp_path_factory.mktemp("mutants")
    # Sixteen bytes a vector and no optimisation: quick to compile, and five units make three panels with a rest.
    quick = {
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": "",
        "NUMBA_OPT": "0",
        "RNNKERN_CACHE_DIR": str(folder / "none"),
    }
    environment = {**os.environ, **quick, "PYTHONPATH": str(Path(__file__).parents[1])}
    with (folder / "stderr").open("w+") as errors:
        server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.numba_mutant"],
            env=environment, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
        assert server.stdin is not None
        assert server.stdout is not None
        ask, answers = server.stdin, server.stdout

        def run(copy: Path, name: str, cell: str) -> float:
            ask.write(json.dumps([str(copy), name, cell]) + "\n")
            ask.flush()
            answer = json.loads(answers.readline() or '"the server has died"')
            assert isinstance(answer, float), f"{answer}: {(folder / 'stderr').read_text()[-3000:]}"
            return answer

        yield run
        ask.close()
        assert server.wait(60) == 0
        answers.close()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(Path(rnnkern.__file__).parent, tmp_path / "rnnkern", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def parameters(common: list[Mutation], full: list[Mutation]) -> list[object]:
    return [
        *(pytest.param(m, id=m.name) for m in common),
        *(pytest.param(m, id=m.name, marks=pytest.mark.slow) for m in full),
    ]


@pytest.mark.parametrize("mutation", parameters(COMMON, FULL))
def test_caught(mutation: Mutation, check: Check, copy: Path) -> None:
    path = copy / "rnnkern" / mutation.file
    source = path.read_text()
    assert source.count(mutation.old) == 1, (
        f"{mutation.file}: {mutation.old!r} is found {source.count(mutation.old)} times, not once"
    )
    path.write_text(source.replace(mutation.old, mutation.new))
    assert check(copy, mutation.check, mutation.cell) > LIMIT, f"no check saw: {mutation.name}"


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        *((name, cell) for name in ("forward", "backward") for cell in ("lstm", "gru", "rnn_tanh")),
        *(pytest.param(name, "rnn_relu", marks=pytest.mark.slow) for name in ("forward", "backward")),
        *(("layers", cell) for cell in ("LSTM", "GRU", "RNN")),
    ],
)
def test_nothing_is_seen_without_a_mutation(name: str, cell: str, check: Check, copy: Path) -> None:
    assert check(copy, name, cell) < LIMIT


@pytest.mark.parametrize("mutation", [pytest.param(m, id=m.name) for m in FULL])
def test_the_table_fits_the_source(mutation: Mutation) -> None:
    """The mutations that do not always run are at least always applicable."""
    source = (Path(rnnkern.__file__).parent / mutation.file).read_text()
    assert source.count(mutation.old) == 1
