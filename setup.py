"""Builds rnnkern. Everything declarative is in pyproject.toml; the CUDA extension of csrc/ will be built from here."""

from setuptools import setup

setup()
