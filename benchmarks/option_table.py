"""What `python -m benchmarks.options` measures: every option that torch.nn lacks, and the shapes it is measured on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from benchmarks.results import MEMORY
from benchmarks.rivals import CELLS
from benchmarks.shapes import Shape, named, select

SUFFIX = "-options"  # of the CSV
RESET_SHARE = 0.03  # of all steps: episodes of some 30 steps
DEAREST = 1.15  # time with an option / plain, at most


@dataclass(frozen=True)
class Option:
    """One option as it is measured. Costs do not depend on the probabilities but for the masks, which all draw."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of the module
    cells: tuple[str, ...] = tuple(CELLS)
    resets: bool = False  # called with `reset=`
    learned: bool = False  # and with a learned state, `reset_to=` (1, 1, H)
    returns_states: bool = False  # called as a function, with `return_states=True`
    dearest: float | None = DEAREST  # the goal for its cost; None: it has none


OPTIONS = {
    option.name: option
    for option in (
        Option("input_dropout", {"input_dropout": 0.3}),
        Option("recurrent_dropout", {"recurrent_dropout": 0.3}),
        Option("weight_dropout", {"weight_dropout": 0.5}),
        Option("zoneout", {"zoneout": 0.1}, dearest=1.30),
        Option("layer_norm", {"layer_norm": True}, dearest=1.40),
        Option("peephole", {"peephole": True}, cells=("lstm",)),
        Option("reset_after=False", {"reset_after": False}, cells=("gru",)),
        Option("reset", resets=True),
        Option("reset_to", resets=True, learned=True),
        Option("return_states", returns_states=True),
        # it trades time, one more forward pass, for memory: its goal is the memory's
        Option("recompute", {"recompute": True}, cells=("lstm", "gru"), dearest=None),
    )
}

RESET_SHAPES = (
    Shape("reset-8", "reset", 128, 8, 64, 128),
    Shape("reset-64", "reset", 128, 64, 64, 128),
    Shape("reset-128", "reset", 128, 128, 64, 256),
)
LONG_SHAPES = (Shape("long-64", "long", 4096, 16, 64, 128), Shape("long-128", "long", 4096, 16, 128, 128))
REGISTERED = ("mnist", "text", "speech", "rl-rollout", "stream", "tiny")  # names in the registry of shapes
SHAPES = (*RESET_SHAPES, *map(named, REGISTERED), *LONG_SHAPES)

# What is measured on a dear shape, unless the command names options.
USUAL_OPTIONS = {"reset-128": ("reset", "reset_to")}


@dataclass(frozen=True)
class Case(Shape):
    """A shape with an option, which is what a record's column `options` says."""

    option: Option = field(kw_only=True)

    def options(self) -> str:
        """The option's name."""
        return self.option.name

    @property
    def has_loop(self) -> bool:
        """Whether a step loop is timed beside it."""
        return self.family != "long"


def chosen_options(patterns: Sequence[str]) -> list[Option]:
    """The options whose name matches one of the patterns, in the order of the table."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in OPTIONS):
            raise ValueError(f"options: expected names among {', '.join(OPTIONS)}, got {pattern!r}")
    return [option for name, option in OPTIONS.items() if any(fnmatchcase(name, p) for p in patterns)]


def cases(cell: str, mode: str, shapes: Sequence[str] | None, options: Sequence[str] | None) -> list[Case]:
    """What is measured of a cell in a mode: for names or patterns of shapes and options, or all that is usual."""
    return [
        Case(**vars(shape), option=option)
        for option in chosen_options(options or ["*"])
        for shape in select(shapes or ["*"], SHAPES)
        if cell in option.cells
        and (option.name == "recompute" or (mode != MEMORY and shape not in LONG_SHAPES))  # no loop over T = 4096
        and (options or option.name in USUAL_OPTIONS.get(shape.name, OPTIONS))
        and (mode != MEMORY or options or shape in LONG_SHAPES)
    ]
