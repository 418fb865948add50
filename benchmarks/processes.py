"""Commands that run unattended: into a log, with a time limit, ended with everything that they started."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

GRACE = 5.0  # seconds between asking a command to end and ending it


class Finished(NamedTuple):
    """How a command ended; `status` is None if its time was up."""

    status: int | None
    seconds: float

    @property
    def ok(self) -> bool:
        """It ended by itself, and well."""
        return self.status == 0

    def why(self) -> str:
        """What else happened, in words."""
        return f"stopped after {self.seconds:.0f} s" if self.status is None else f"exit status {self.status}"


def run(
    command: Sequence[str | Path], log: Path, limit: float, folder: Path, environment: Mapping[str, str]
) -> Finished:
    """Runs the command in `folder`, its output added to `log`; after `limit` seconds ends it and all its children."""
    start = perf_counter()
    with log.open("a") as file:
        file.write(f"\n$ {' '.join(map(str, command))}\n")
        file.flush()
        try:
            process = subprocess.Popen(
                [str(word) for word in command],
                cwd=folder,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            file.write(f"cannot be started: {error}\n")
            return Finished(127, perf_counter() - start)
        try:
            status: int | None = process.wait(max(limit, 0))
        except subprocess.TimeoutExpired:
            status = None
            file.write(f"\nits time was up: stopped after {limit:.0f} s\n")
        finally:
            end_group(process)
    return Finished(status, perf_counter() - start)


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """Ends what is left of the process's group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def tail(log: Path, lines: int) -> str:
    """The end of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else ""
