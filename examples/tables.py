"""What runs gave, as markdown tables and pictures, beside what was published."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from examples.arguments import Refused
from examples.catalogue import CATALOGUE, CLIPS, FAMILIES, SMOKE, Entry, Family
from examples.plots import plot_comparison, plot_confusions
from examples.training import RESULT, UNFINISHED, Result, read_result

COLUMNS = (
    "run", "model", "accuracy", "published", "loss", "published", "training loss", "epochs", "s/epoch", "published",
    "steps: rnnkern, torch.nn", "parameters: Keras, torch",
)  # fmt: skip
CLIP_COLUMNS = ("run", "precision", "recall", "F1", "TPR", "TNR", "s/frame", "s/epoch", "on smoke, published")
NOTHING = "-"


def read_results(runs: Path) -> list[Result]:
    """Those of all finished runs of the catalogue, in its order; of models that are not in it, none."""
    paths = [path for path in sorted(runs.glob(f"*/{RESULT}")) if path.parent.suffix != UNFINISHED]
    found, order = map(read_result, paths), list(CATALOGUE)
    return sorted((r for r in found if r.entry in CATALOGUE), key=lambda result: order.index(result.entry))


def table(results: Iterable[Result]) -> str:
    """A row a run: what was measured, and what was published where something was."""
    return markdown(COLUMNS, [row(result, CATALOGUE[result.entry]) for result in results])


def row(result: Result, entry: Entry) -> list[str]:
    """A run among others; where the published accuracy is not reached, it says by how much."""
    accuracy = f"{result.test_accuracy:.4f}"
    if entry.accuracy is not None and result.test_accuracy < entry.accuracy:
        accuracy += f", {entry.accuracy - result.test_accuracy:.4f} below"
    steps = ", ".join(
        f"{result.step_seconds[name]:.1f}" for name in ("rnnkern", "torch") if name in result.step_seconds
    )
    return [
        label(result),
        "; ".join(map(str, entry.layers)) + (f" ({entry.note})" if entry.note else ""),
        accuracy,
        number(entry.accuracy),
        number(result.test_loss),
        number(entry.loss),
        f"{result.history[0]['train_loss']:.3f} to {result.history[-1]['train_loss']:.3f}",
        f"{result.epochs}"
        if result.epochs == result.asked["epochs"]
        else f"{result.epochs} of {result.asked['epochs']}",
        f"{result.seconds_per_epoch:.1f}",
        entry.seconds or NOTHING,
        steps or NOTHING,
        f"{result.keras_parameters:,}, {result.parameters:,}",
    ]


def label(result: Result) -> str:
    """A run's name, and in what it is not the catalogue's."""
    asked, recipe, marks = result.asked, CATALOGUE[result.entry].family.recipe, []
    if asked["epochs"] != recipe.epochs:
        marks.append(f"{asked['epochs']} of {recipe.epochs} epochs")
    if asked["limit_steps"] is not None:
        marks.append(f"{asked['limit_steps']} batches a pass")
    if asked["seed"] != 0:
        marks.append(f"seed {asked['seed']}")
    return f"{result.name} ({', '.join(marks)})" if marks else result.name


def clip_table(results: Iterable[Result]) -> str:
    """The measures of two classes, in percent, and the seconds that a frame takes in a test of one clip."""
    rows = []
    for result in results:
        measures = [f"{100 * result.measures[name]:.2f}" for name in ("precision", "recall", "f1", "tpr", "tnr")]
        published = ", ".join(f"{value:g}" for value in SMOKE[result.entry])
        seconds = [f"{result.measures['seconds_a_frame']:.5f}", f"{result.seconds_per_epoch:.1f}"]
        rows.append([label(result), *measures, *seconds, published])
    return markdown(CLIP_COLUMNS, rows)


def number(value: float | None) -> str:
    """Four decimals."""
    return NOTHING if value is None else f"{value:.4f}"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def compare(results: Sequence[Result], runs: Path) -> str:
    """The table of some runs, which with their picture is left in the folder."""
    text = table(results)
    (runs / "comparison.md").write_text(text + "\n")
    plot_comparison({result.name: result.history for result in results}, "Runs", runs / "comparison.png")
    return text


def report(runs: Path, document: Path) -> None:
    """Puts the table and both pictures of every family that was run into its place in the document, which is made if it
    is not there; the text around stays.

    Raises:
        Refused: there are no results, or the document lacks the place of a family or cannot be written.
    """
    if not document.suffix or document.is_dir():
        raise Refused(f"--write: expected a file like docs/results.md, got {document}; choose another")
    results = read_results(runs)
    if not results:
        raise Refused(f"{runs}: expected runs of the catalogue, found none; `python -m examples all` runs it")
    text = document.read_text() if document.is_file() else blank()
    pictures = document.with_suffix("")
    try:
        pictures.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"--write: expected to write beside {document}, got {error.strerror}; choose another") from error
    for family in FAMILIES:
        chosen = [result for result in results if CATALOGUE[result.entry].family is family]
        if chosen:
            text = insert(text, family.name, section(family, chosen, pictures))
    part = document.with_name(f"{document.name}.part")
    part.write_text(text)
    part.replace(document)


def section(family: Family, results: Sequence[Result], pictures: Path) -> str:
    """A family's table, and its pictures drawn."""
    parts = [table(results), *([clip_table(results)] if family is CLIPS else [])]
    for kind in ("curves", "confusion"):
        path = pictures / f"{family.name}-{kind}.png"
        if kind == "curves":
            plot_comparison({result.name: result.history for result in results}, family.title, path)
        else:
            matrices = {result.name: result.confusion for result in results}
            plot_confusions(matrices, family.data.classes, family.title, path)
        parts.append(f"![{family.title}, {kind}]({pictures.name}/{path.name})")
    return "\n\n".join(parts)


def insert(text: str, name: str, found: str) -> str:
    """The text with what was found between the two marks of that name."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    place = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if len(place.findall(text)) != 1:
        raise Refused(f"document: expected {begin} and {end} once, found another number; write them where they belong")
    return place.sub(lambda _: f"{begin}\n\n{found}\n\n{end}", text)


def blank() -> str:
    """A document with the places of all families."""
    places = (f"## {family.title}\n\n<!-- {family.name} -->\n<!-- end of {family.name} -->" for family in FAMILIES)
    return "\n\n".join(["# What the catalogue's models reach", *places]) + "\n"
