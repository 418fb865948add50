"""Small trainings that show rnnkern at work; run them from a checkout, for example `python examples/mnist.py`."""
