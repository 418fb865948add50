"""The backend that `tests.host.register` registers."""

from benchmarks.host_backend import backend

__all__ = ["backend"]
