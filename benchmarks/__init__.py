"""How fast rnnkern is, beside torch.nn and onnxruntime.

`python -m benchmarks` measures and says which goals are missed, `python -m benchmarks.scaling` measures how packed
training grows with T, `python -m benchmarks.report` draws the pictures. docs/performance.md has the method.

shapes.py      the registry: what is measured, by name and family; and shapes that a user spells
rivals.py      how each implementation is built and called, and the check that they agree before any is timed
onnx_rival.py  the same layer as an ONNX model for onnxruntime
measure.py     one row of the table, of times or of memory
timing.py      all implementations in turn in one process, and the statistics of what came
memory.py      peak memory of a training step, each in a process of its own
scaling.py     the time of packed training over T
machine.py     the CPU, the versions, and the ceiling of one core
results.py     a line of the CSV, reading and writing it, ratios and means
tables.py      markdown tables of them
goals.py       what falls short of a goal, for the command and the report
report.py      the picture, and all of it into a document
"""
