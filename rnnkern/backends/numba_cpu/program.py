"""What a planned call does with tensors: makes those that it gives, takes a workspace, and starts the sweeps."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnkern import native
from rnnkern.backends.numba_cpu.launch import Launch
from rnnkern.backends.pages import in_huge_pages

# A workspace up to this size is kept from one call to the next. A small one takes as long to allocate as to use; one
# that fits the caches is still there, while memory that malloc gives anew may lie elsewhere and fault.
MOST_KEPT_BYTES = 4 << 20

Shape = tuple[int, ...]

# Those not in use, by how many numbers of which dtype they hold: there are never more than calls ran at once.
_free: dict[tuple[int, torch.dtype], list[Tensor]] = {}


class _Workspaces:
    """Workspaces of a program: those that caches hold are kept for all programs of about the size, each taken and given
    back by one operation, so that threads never share one."""

    def __init__(self, x: Tensor, space: int) -> None:
        self.keeps = space <= MOST_KEPT_BYTES
        self.numbers = (1 << (space - 1).bit_length() if self.keeps else space) // x.element_size()
        self.free = _free.setdefault((self.numbers, x.dtype), []) if self.keeps else []

    def take(self, x: Tensor) -> Tensor:
        try:
            return self.free.pop()
        except IndexError:
            return x.new_empty(self.numbers)

    def give(self, workspace: Tensor) -> None:
        if self.keeps:
            self.free.append(workspace)


class Contents(NamedTuple):
    """The tensors of a program beside those that a call gives it. Its launches know all of them in this order: the
    workspace, those given, constants, those made."""

    constants: Sequence[Tensor]
    empty: Sequence[Shape]  # of those made, which sweeps write, and come first
    zeroed: Sequence[Shape]  # and of those that they add to
    large: Sequence[int]  # which of them ask for huge pages
    space: int  # bytes of the workspace


class Program:
    """Runs launches one after the other. Where the extension was built, its class of this name does the same."""

    def __init__(self, launches: Sequence[Launch], contents: Contents, x: Tensor) -> None:
        self.launches, self.contents = launches, contents
        self.workspaces = _Workspaces(x, contents.space)

    def __call__(self, *given: Tensor) -> tuple[Tensor, ...]:
        """The tensors that it makes."""
        x, contents = given[0], self.contents
        made = [x.new_empty(*shape) for shape in contents.empty]
        made += [x.new_zeros(*shape) for shape in contents.zeroed]
        for i in contents.large:
            in_huge_pages(made[i])
        workspace = self.workspaces.take(x)
        everything = [workspace, *given, *contents.constants, *made]
        addresses = [tensor.data_ptr() for tensor in everything]
        for launch in self.launches:
            launch(addresses, everything)
        self.workspaces.give(workspace)
        return tuple(made)


def program(launches: Sequence[Launch], contents: Contents, x: Tensor) -> Any:
    """A Program for tensors like x, in C++ where it can be had."""
    if native.calls is None:
        return Program(launches, contents, x)
    return native.calls.Program([launch.native() for launch in launches], *contents)
