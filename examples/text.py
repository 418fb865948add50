"""A text that is there wherever Python is, and its way to a training: parallel streams in chunks."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

Batch = tuple[Tensor, Tensor]  # characters and those that follow them, (B, T) each


def standard_library_text(folder: Path | None = None) -> str:
    """The docstrings of the modules in `folder`, the standard library's: there wherever Python is, and some 900,000
    characters. Those in ASCII, so that few characters are rare."""
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    trees = (ast.parse(file.read_bytes()) for file in sorted(folder.glob("*.py")))
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = [ast.get_docstring(node) for tree in trees for node in ast.walk(tree) if isinstance(node, documented)]
    text = "\n\n".join(docstring for docstring in found if docstring and docstring.isascii())
    if not text:
        raise FileNotFoundError(f"{folder}: expected Python sources with docstrings, found none; use another Python")
    return text


@dataclass(frozen=True)
class Chunks:
    """A text (N,) of character numbers as parallel streams, each cut into chunks that follow one another."""

    text: Tensor
    streams: int
    chunk: int

    def __post_init__(self) -> None:
        least = self.streams * self.chunk + 1
        if len(self.text) < least:
            raise ValueError(
                f"text: expected at least {least} characters for {self.streams} streams in chunks of {self.chunk}, "
                f"got {len(self.text)}; ask for a smaller --batch or --chunk"
            )

    def __len__(self) -> int:
        return (len(self.text) - 1) // (self.streams * self.chunk)

    def __iter__(self) -> Iterator[Batch]:
        size = len(self) * self.chunk * self.streams
        inputs, targets = (self.text[start : start + size].view(self.streams, -1) for start in (0, 1))
        yield from zip(inputs.split(self.chunk, 1), targets.split(self.chunk, 1), strict=True)
