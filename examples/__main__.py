"""The catalogue of classifiers: lists, trains, compares and tests them.

python -m examples --list
python -m examples NAME                 trains one, into runs/NAME
python -m examples compare NAME NAME@torch ...  trains several, by the backends behind @, into one table and picture
python -m examples evaluate NAME        tests what a training left
python -m examples all [PATTERN ...]    trains all of which there is no result yet
python -m examples report               puts tables and pictures of all results into docs/results.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from examples import tables
from examples.arguments import BACKENDS, Refused, add_settings
from examples.catalogue import CATALOGUE, ENTRIES, Entry
from examples.data import Dataset, NotFetchedError
from examples.datasets import Data, Reviews
from examples.training import Result, Settings, check, evaluate, is_done, make_runs_dir, train


class Loader:
    """Loads data sets; the last one is kept, as the next entry often has the same."""

    def __init__(self, data_dir: Path | None) -> None:
        self.data_dir = data_dir
        self._last: tuple[Data, Dataset] | None = None

    def load(self, data: Data) -> Dataset:
        """Its tensors. Raises Refused if they are not to be had."""
        if self._last is None or self._last[0] != data:
            self._last = None  # frees the memory first
            try:
                self._last = data, data.load(self.data_dir)
            except (FileNotFoundError, ValueError, NotFetchedError) as error:
                raise Refused(str(error)) from error
        return self._last[1]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = make_parser()
    options = vars(parser.parse_args(argv))
    words, listed, truncating, document = (options.pop(name) for name in ("words", "list", "truncating", "write"))
    loader, settings = Loader(options.pop("data_dir")), Settings(**options)
    try:
        match words:
            case _ if listed:
                print(listing())
            case ["report"]:
                tables.report(settings.runs_dir, document)
            case ["all", *patterns]:
                train_all(patterns or ["*"], truncating, settings, loader)
            case ["compare", first, *others]:
                compare([first, *others], truncating, settings, loader)
            case ["evaluate", name]:
                test(find(name, truncating), settings, loader)
            case ["compare" | "evaluate" as command, *names]:
                raise Refused(f"{command}: expected {'one NAME' if names else 'a NAME'} behind it; see --list")
            case [name]:
                run(find(name, truncating), settings, loader)
            case _:
                raise Refused("expected --list, a NAME, or compare, evaluate, all or report; see --help")
    except Refused as error:
        parser.error(str(error))


def make_parser() -> argparse.ArgumentParser:
    """All of the options; which of them mean something depends on the command."""
    parser = argparse.ArgumentParser(
        prog="python -m examples", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="NAME", help="of an entry, or a command and names")
    parser.add_argument("--list", action="store_true", help="show the catalogue")
    add_settings(parser)
    parser.add_argument(
        "--truncating", choices=("pre", "post"), default="pre", help="which end of long reviews is cut (default pre)"
    )
    parser.add_argument(
        "--write", type=Path, default=Path("docs/results.md"), metavar="M", help="of report (default docs/results.md)"
    )
    return parser


def listing() -> str:
    """Every entry with its model and what was published of it, by family."""
    lines, family = [], None
    width = max(map(len, CATALOGUE))
    for entry in ENTRIES:
        if entry.family is not family:
            family = entry.family
            lines.append(f"\n{family.title}: {recipe(entry)}")
        published = ", ".join(f"{value:.4f}" for value in (entry.accuracy, entry.loss) if value is not None)
        lines.append(
            f"  {entry.name:{width}}  {'; '.join(map(str, entry.layers))}" + f"  [{published}]" * bool(published)
        )
    return "\n".join(lines).strip() + "\n\nIn brackets: published test accuracy and loss."


def recipe(entry: Entry) -> str:
    """A family's training in words."""
    said = entry.family.recipe
    held = "no validation" if said.holdout is None else f"validation {said.holdout.share}"
    patience = "" if said.patience is None else f", early stopping after {said.patience}"
    return f"{said.epochs} epochs, batch {said.batch}, {said.optimizer} {said.rate:g}, {held}{patience}"


def find(name: str, truncating: str) -> Entry:
    """The entry of that name; for reviews whose end is cut, a variant of it."""
    if name not in CATALOGUE:
        close = get_close_matches(name, CATALOGUE, 3)
        hint = f"did you mean {', '.join(close)}?" if close else "see --list"
        raise Refused(f"NAME: expected an entry of the catalogue, got {name!r}; {hint}")
    entry = CATALOGUE[name]
    if truncating == "pre":
        return entry
    if not isinstance(entry.family.data, Reviews):
        raise Refused(f"--truncating: expected an entry on IMDB, got {name}; leave the option out")
    data = replace(entry.family.data, truncating="post")
    return replace(entry, variant="-post", family=replace(entry.family, data=data))


def run(entry: Entry, settings: Settings, loader: Loader) -> Result:
    """Trains one."""
    check(entry, settings)
    make_runs_dir(settings)
    return train(entry, loader.load(entry.family.data), settings)


def test(entry: Entry, settings: Settings, loader: Loader) -> None:
    """Tests one, and prints what it reaches."""
    check(entry, settings)
    found = evaluate(entry, loader.load(entry.family.data), settings)
    say(", ".join(f"{name} {value:.4f}" for name, value in found.items()))


def compare(names: Sequence[str], truncating: str, settings: Settings, loader: Loader) -> None:
    """Trains each, and prints their table."""
    chosen: list[tuple[Entry, Settings]] = []
    for word in names:
        name, _, backend = word.partition("@")
        if backend and backend not in BACKENDS:
            raise Refused(f"{word}: expected a backend among {', '.join(BACKENDS)} behind @, got {backend!r}")
        own = replace(settings, backend=backend or settings.backend)
        entry = find(name, truncating)
        check(entry, own)
        if any(own.folder(entry) == other.folder(earlier) for earlier, other in chosen):
            raise Refused(f"{word}: expected each run once, got it twice; leave one out")
        chosen.append((entry, own))
    for entry, _ in chosen:
        loader.load(entry.family.data)  # before anything is trained in vain
    results = [run(entry, own, loader) for entry, own in chosen]
    conclude(results, settings.runs_dir)


@rank_zero_only
def say(text: str) -> None:
    """Prints it, once where several processes train."""
    print(text, flush=True)


@rank_zero_only
def conclude(results: Sequence[Result], runs: Path) -> None:
    """Leaves and prints the table of runs."""
    print(tables.compare(results, runs))


def train_all(patterns: Sequence[str], truncating: str, settings: Settings, loader: Loader) -> None:
    """Trains the entries that match a pattern, timed against torch.nn, one after the other; those that have a result
    are left, so that the same command goes on where it was interrupted. Exits with 1 if data was not to be had."""
    settings = replace(settings, against_torch=True)
    names = [name for name in CATALOGUE if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not names:
        raise Refused(f"all: expected names or patterns of the catalogue, got {' '.join(patterns)}; see --list")
    missed = []
    for place, name in enumerate(names, 1):
        entry = find(name, truncating)
        say(f"[{place}/{len(names)}] {entry.name}")
        if is_done(entry, settings):
            continue
        try:
            run(entry, settings, loader)
        except Refused as error:
            print(f"{entry.name}: {error}", file=sys.stderr)
            missed.append(entry.name)
    if missed:
        sys.exit(1)


if __name__ == "__main__":
    main()
