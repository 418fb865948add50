"""Kernels for NVIDIA GPUs: `extension` finds the compiled ones, `sweeps` runs a layer on them."""
