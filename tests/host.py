"""The CUDA sweeps on the CPU, as the benchmark runs them too: `register` makes them backend="host"."""

from benchmarks.host import BACKEND_MODULE, BUILD, ROOT, builder, extension, load_from, register

__all__ = ["BACKEND_MODULE", "BUILD", "ROOT", "builder", "extension", "load_from", "register"]
