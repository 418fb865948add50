"""Trainings that show rnnkern at work, from a checkout: `python -m examples --list`, `python examples/mnist.py`."""
