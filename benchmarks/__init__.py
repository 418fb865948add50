"""How fast rnnkern is, beside torch.nn and onnxruntime.

`python -m benchmarks` measures, `python -m benchmarks.report` draws the picture.

shapes.py      the registry: what is measured, by name and family
rivals.py      how each implementation is built and called, and the check that they agree before any is timed
onnx_rival.py  the same layer as an ONNX model for onnxruntime
timing.py      all implementations in turn in one process, and the statistics of what came
memory.py      peak memory of a training step, each in a process of its own
machine.py     the CPU, the versions, and the ceiling of one core
results.py     a line of the CSV, reading and writing it, geometric means
report.py      the picture and a markdown table from the CSV
"""
