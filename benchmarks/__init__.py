"""How fast rnnkern is, beside torch.nn and onnxruntime.

`python -m benchmarks` measures and says which goals are missed, `python -m benchmarks.scaling` measures how packed
training grows with T, `python -m benchmarks.report` draws the pictures. docs/performance.md has the method.

platforms.py   what it runs on (`--device`): the CPU, a GPU, or the host, where the GPU's kernels run on the CPU
shapes.py      the registry of the CPU: what is measured, by name and family; and shapes that a user spells
gpu_shapes.py  the registry of the GPU, and the same cut down for the host
precisions.py  the arithmetic of a row: dtype, TF32, how far two implementations may differ
rivals.py      how each implementation is built and called, and the check that they agree before any is timed
onnx_rival.py  the same layer as an ONNX model for onnxruntime
measure.py     one row of the table, of times or of memory
timing.py      all implementations in turn in one process, and the statistics of what came
memory.py      peak memory of a training step, each in a process of its own
scaling.py     the time of packed training over T
machine.py     the CPU, the GPU, the versions, and the ceiling of one core
floors.py      what a call cannot be quicker than on a GPU, and the ceilings that this follows from
cudnn.py       which algorithm cuDNN runs in torch.nn's layers
host.py        the device host: builds the GPU's kernels for the CPU; host_backend.py is the backend
results.py     a line of the CSV, reading and writing it, ratios and means
screen.py      a row as it stands on the screen
tables.py      markdown tables of them; gpu_tables.py those of a GPU
goals.py       what falls short of a goal, for the command and the report
report.py      the picture, and all of it into a document

`python -m benchmarks.options` measures what the options beyond torch.nn cost; docs/performance-options.md.

options.py         the command; options_report.py puts its tables into the document
option_table.py    the options and the shapes that they are measured on
option_loops.py    a layer with an option as a step loop in torch
option_rivals.py   rnnkern without and with the option, and the loop
option_tables.py   costs and gains, their means and goals

`python -m benchmarks.gpu_run` does everything that there is to do on a machine with a GPU, unattended.

gpu_run.py          the command; gpu_parts.py has its parts
processes.py        commands with a log and a time limit
pytest_report.py    what pytest says of a run
gpu_environment.py  the record of what it ran on
small_calls.py      every kernel on small shapes, for compute-sanitizer
gpu/                probe.cu: what barriers, exchanges and products cost on a GPU
"""
