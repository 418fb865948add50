"""Defects put into the source on purpose, each of which a named check of numba_mutant.py must see.

What is shown is that the comparisons the other tests make are sharp: a derivative, an edge or a bias that is wrong
does not pass. A mutation whose text is no longer in the source fails, so that the table follows the code.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import rnnkern
from tests.mutations import COMPILED, PYTHON, Mutation, changed
from tests.mutations_cells import OF_CELLS
from tests.mutations_optional import OF_OPTIONAL
from tests.mutations_options import OF_OPTIONS
from tests.mutations_sweeps import OF_SWEEPS

LIMIT = 1e-10  # of float64 sweeps over a few steps; without a mutation the error is about 1e-15
PACKAGE = Path(rnnkern.__file__).parent

Check = Callable[[str, str, str, str], float]


@contextmanager
def server(folder: Path, settings: dict[str, str]) -> Iterator[Check]:
    """Runs checks on rnnkern with the text of one file changed; returns the error each found."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), **settings}
    with (folder / "stderr").open("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.numba_mutant"],
            env=environment, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        ask, answers = process.stdin, process.stdout

        def run(file: str, text: str, name: str, cell: str) -> float:
            ask.write(json.dumps([file, text, name, cell]) + "\n")
            ask.flush()
            answer = json.loads(answers.readline() or '"the server has died"')
            assert isinstance(answer, float), f"{answer}: {(folder / 'stderr').read_text()[-3000:]}"
            return answer

        yield run
        ask.close()
        assert process.wait(60) == 0
        answers.close()


@pytest.fixture(scope="module")
def compiling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Check]:
    """Compiles what it checks: sixteen bytes a vector and no optimisation, which is quick, and makes three panels of
    five units, with a rest."""
    folder = tmp_path_factory.mktemp("compiling")
    # A cache below a file, not a folder: what is compiled must never be found again for another text.
    nowhere = {"RNNKERN_CACHE_DIR": str(folder / "stderr" / "none")}
    quick = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_OPT": "0"}
    with server(folder, quick | nowhere) as check:
        yield check


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Check]:
    """Takes the kernels that there are from the cache: for files that are not compiled."""
    with server(tmp_path_factory.mktemp("cached"), {}) as check:
        yield check


def mutated(mutation: Mutation) -> str:
    """The text of the file with the mutation in it."""
    return changed((PACKAGE / mutation.file).read_text(), mutation.file, mutation.old, mutation.new)


def named(mutations: list[Mutation], *marks: pytest.MarkDecorator) -> list[object]:
    return [pytest.param(m, id=m.name, marks=marks) for m in mutations]


LONG = [*OF_CELLS, *OF_SWEEPS, *OF_OPTIONAL]


@pytest.mark.parametrize("mutation", [*named(COMPILED), *named(LONG, pytest.mark.slow)])
def test_caught(mutation: Mutation, compiling: Check) -> None:
    found = compiling(mutation.file, mutated(mutation), mutation.check, mutation.cell)
    assert found > LIMIT, f"no check saw: {mutation.name}"


@pytest.mark.parametrize("mutation", named([*PYTHON, *OF_OPTIONS]))
def test_caught_without_compiling(mutation: Mutation, cached: Check) -> None:
    found = cached(mutation.file, mutated(mutation), mutation.check, mutation.cell)
    assert found > LIMIT, f"no check saw: {mutation.name}"


CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
EVERY_CELL = (*CELLS, "gru_reset_before")
SWEEPS = [(name, cell) for name in ("forward", "backward") for cell in CELLS] + [("flushed", "rnn_relu")]
CALLS = [(name, cell) for name in ("repeated", "layers") for cell in ("LSTM", "GRU", "RNN")]
OTHERS = [("strides", "rnn_tanh"), ("shares", "rnn_tanh")]
OTHERS += [(name, cell) for name in ("optional_forward", "optional_backward") for cell in EVERY_CELL]
ALWAYS = {("forward", "rnn_tanh"), ("backward", "rnn_tanh")}


@pytest.mark.parametrize(
    ("name", "cell"), [pytest.param(*c, marks=() if c in ALWAYS else pytest.mark.slow) for c in SWEEPS]
)
def test_nothing_is_seen_without_a_mutation(name: str, cell: str, compiling: Check) -> None:
    assert compiling("cells.py", (PACKAGE / "cells.py").read_text(), name, cell) < LIMIT


@pytest.mark.parametrize(("name", "cell"), [*SWEEPS, *CALLS, *OTHERS])
def test_nothing_is_seen_without_a_mutation_or_compiling(name: str, cell: str, cached: Check) -> None:
    assert cached("cells.py", (PACKAGE / "cells.py").read_text(), name, cell) < LIMIT


@pytest.mark.parametrize("mutation", named(LONG))
def test_the_table_fits_the_source(mutation: Mutation) -> None:
    """The mutations that do not always run are at least always applicable."""
    mutated(mutation)


def test_a_mutation_has_a_name_of_its_own() -> None:
    names = [m.name for m in (*COMPILED, *PYTHON, *LONG, *OF_OPTIONS)]
    assert len(set(names)) == len(names)
