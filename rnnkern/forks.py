"""Whether this process is a fork, made after rnnkern was imported: such a child has none of the threads that others had
started, and would wait for them."""

import os

forked = False


def _note() -> None:
    global forked
    forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note)
