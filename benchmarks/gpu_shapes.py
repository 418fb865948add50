"""The shapes that are measured on a GPU, and the same cut down for the host, whose CPU runs the kernels slowly."""

from collections.abc import Iterable
from dataclasses import replace

from benchmarks.shapes import Shape

GRID_H, GRID_B = (64, 128, 256, 512, 1024, 2048), (1, 16, 64, 256)

GPU_SHAPES = (
    # every H with every B
    *(Shape(f"h{H}-b{B}", "grid", 128, B, H, H) for H in GRID_H for B in GRID_B),
    # rows of an image as steps
    Shape("image", "image", 28, 64, 28, 128),
    Shape("image-wide", "image", 28, 256, 28, 128),
    # many steps
    Shape("long", "long", 1024, 1, 256, 256),
    Shape("long-speech", "long", 512, 32, 80, 320),
    Shape("long-language", "long", 1024, 16, 768, 768),
    # multiples of nothing
    Shape("odd", "odd", 100, 7, 31, 97),
    Shape("odd-wide", "odd", 200, 65, 101, 333),
    # reinforcement learning: rollouts of many environments
    Shape("rl-t16", "rl", 16, 65536, 128, 128),
    Shape("rl-t16-wide", "rl", 16, 16384, 256, 512),
    Shape("rl-t32", "rl", 32, 8192, 256, 256),
    Shape("rl-t64", "rl", 64, 8192, 64, 128),
    Shape("rl-t128", "rl", 128, 4096, 256, 256),
    Shape("rl-t128-wide", "rl", 128, 1024, 256, 512),
    Shape("both-ways", "bidirectional", 128, 16, 256, 256, bidirectional=True),
    Shape("both-ways-wide", "bidirectional", 128, 64, 512, 512, bidirectional=True),
    Shape("stacked", "stacked", 128, 64, 512, 512, layers=2),
    Shape("stacked-both-ways", "stacked", 128, 32, 256, 256, layers=2, bidirectional=True),
    # sequences of different length; torch.nn gets a PackedSequence for all
    Shape("lengths", "lengths", 128, 64, 256, 256, ragged="lengths"),
    Shape("lengths-both-ways", "lengths", 128, 64, 256, 256, ragged="lengths", bidirectional=True),
    Shape("lengths-speech", "lengths", 512, 32, 80, 320, ragged="lengths"),
    Shape("packed", "lengths", 128, 64, 256, 256, ragged="packed"),
)

MOST_T, MOST_B, MOST_I, MOST_H = 5, 18, 12, 20  # of a shape cut down: more than one tile, and not quite two


def cut(shape: Shape) -> Shape:
    """The shape with no size above those; an odd one stays odd."""

    def small(size: int, most: int) -> int:
        return min(size, most - (most - size) % 2)

    return replace(
        shape, T=small(shape.T, MOST_T), B=small(shape.B, MOST_B), I=small(shape.I, MOST_I), H=small(shape.H, MOST_H)
    )


def cut_down(shapes: Iterable[Shape]) -> list[Shape]:
    """All of them cut; of those that then are the same but for the name, the first."""
    different: dict[Shape, Shape] = {}
    for shape in map(cut, shapes):
        different.setdefault(replace(shape, name="", family=""), shape)
    return list(different.values())
