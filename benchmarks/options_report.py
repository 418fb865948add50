"""Tables from what `python -m benchmarks.options` wrote, on the screen, or with `--write` into
docs/performance-options.md. Every row is from its newest measurement."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks import results
from benchmarks.machine import ROOT
from benchmarks.option_table import SUFFIX
from benchmarks.option_tables import summary
from benchmarks.report import insert
from benchmarks.results import RNNKERN
from benchmarks.tables import origin

DOCUMENT = ROOT / "docs" / "performance-options.md"


def section(path: Path) -> str:
    """One machine's tables, and what falls short of a goal."""
    rows = results.read(path)
    ours = rows[0][RNNKERN]
    return "\n\n".join([f"### {ours.computer}, {ours.dtype}", origin(rows), summary(rows)])


def main(argv: Sequence[str] | None = None) -> None:
    """Reports on every file that is named, or there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.options_report", description="Show what options cost.")
    parser.add_argument("files", nargs="*", type=Path, metavar="CSV", help="default: all in benchmarks/results")
    parser.add_argument(
        "--write", nargs="?", const=DOCUMENT, type=Path, metavar="DOCUMENT",
        help=f"put it between a document's markers (default: {DOCUMENT.relative_to(ROOT)}) and not on the screen",
    )  # fmt: skip
    chosen = parser.parse_args(argv)
    files = chosen.files or sorted(results.FOLDER.glob(f"*{SUFFIX}.csv"))
    if not files:
        parser.error("files: expected a CSV in benchmarks/results; run `python -m benchmarks.options` first")
    text = "\n\n".join(map(section, files))
    if chosen.write:
        insert(chosen.write, text)
        print(f"{len(files)} file{'s' if len(files) > 1 else ''} reported in {chosen.write}")
    else:
        print(text)


if __name__ == "__main__":
    main()
