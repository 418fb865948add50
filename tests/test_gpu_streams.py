"""On a GPU: graphs of launches, streams, devices, memory; and that no call waits for the device."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from rnnkern.cells import TORCH_CELLS
from tests.gpu_support import Target, assert_same_bits, on_both, on_cuda
from tests.tables import Case

# torch's own word on set_sync_debug_mode
pytestmark = pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")

every_cell = pytest.mark.parametrize("cell", TORCH_CELLS)
T, B, INPUTS, HIDDEN = 6, 5, 3, 40
LENGTHS = torch.tensor([2, 6, 1, 5, 5])

Step = Callable[[], tuple[Tensor, ...]]


@contextmanager
def unsynchronised() -> Iterator[None]:
    """Whatever waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def inference_step(module: Any, x: Tensor, lengths: Tensor | None) -> Step:
    """A call without gradients on what x and lengths then hold."""

    def step() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (module(x, lengths=lengths)[0],)

    return step


def training_step(module: Any, x: Tensor, lengths: Tensor | None) -> Step:
    """A call with all gradients, on what x and lengths then hold."""

    def step() -> tuple[Tensor, ...]:
        output, _ = module(x, lengths=lengths)
        leaves = [leaf for leaf in (x, *module.parameters()) if leaf.requires_grad]
        return output.detach(), *torch.autograd.grad(output.pow(2).sum(), leaves)

    return step


STEPS = {"inference": inference_step, "training": training_step}
every_step = pytest.mark.parametrize("kind", STEPS)
with_lengths = pytest.mark.parametrize("lengths", [False, True], ids=["padded", "lengths"])


def make_step(target: Target, cell: str, kind: str, lengths: bool, **options: Any) -> tuple[Step, Tensor, Tensor]:
    """A step, and the input and lengths that it reads."""
    module = target.layer(cell, INPUTS, HIDDEN, **options)
    x, given = target.random(T, B, INPUTS), LENGTHS.to(target.device)
    return STEPS[kind](module, x, given if lengths else None), x, given


@on_both
@with_lengths
@every_step
@every_cell
def test_steps_read_what_is_in_their_inputs_now(target: Target, cell: str, kind: str, lengths: bool) -> None:
    """What the tests below do on a device, without one."""
    step, x, given = make_step(target, cell, kind, lengths, bidirectional=True)
    first = step()
    x.mul_(2)
    given.copy_(LENGTHS.flip(0))
    second = step()
    assert len(first) == (1 if kind == "inference" else 1 + 8)
    assert not torch.equal(first[0], second[0])


@on_cuda
@with_lengths
@every_step
@every_cell
def test_graph_replayed_with_new_inputs(target: Target, cell: str, kind: str, lengths: bool) -> None:
    step, x, given = make_step(target, cell, kind, lengths, num_layers=2, bidirectional=True)
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):  # what is only done once is not for the graph
            step()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed, order in ((1, LENGTHS), (2, LENGTHS.flip(0)), (3, LENGTHS.roll(1))):
        torch.manual_seed(seed)
        x.copy_(target.random(T, B, INPUTS))
        given.copy_(order)
        graph.replay()
        found = [tensor.clone() for tensor in captured]
        for own, wanted in zip(found, step(), strict=True):
            torch.testing.assert_close(own, wanted)


@on_cuda
@every_step
@every_cell
def test_two_streams_at_once(target: Target, cell: str, kind: str) -> None:
    """Queued in turns on two streams, and from two threads: the results of one after the other."""
    steps = [make_step(target, cell, kind, True, num_layers=2)[0] for _ in range(2)]
    wanted = [step() for step in steps]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in steps]
    found: list[list[tuple[Tensor, ...]]] = [[], []]

    def queue(which: int) -> None:
        with torch.cuda.stream(streams[which]):
            found[which].append(steps[which]())

    for _ in range(10):
        queue(0)
        queue(1)
    with ThreadPoolExecutor(2) as threads:
        for waiting in [threads.submit(queue, which) for which in (0, 1) * 10]:
            waiting.result()
    torch.cuda.synchronize()
    for results, expected in zip(found, wanted, strict=True):
        for result in results:
            torch.testing.assert_close(result, expected, rtol=0, atol=0)


@on_cuda
@every_step
@every_cell
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}, {"batch_first": True}], ids=str)
def test_no_call_waits_for_the_device(target: Target, cell: str, kind: str, options: dict[str, Any]) -> None:
    module = target.layer(cell, INPUTS, HIDDEN, **options)
    x = target.random(T, B, INPUTS)
    batch = x.transpose(0, 1).contiguous() if module.batch_first else x
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    on_device = LENGTHS.to(target.device)

    def run() -> None:
        for output in (
            module(batch)[0],
            module(batch, lengths=on_device)[0],
            module(batch, lengths=LENGTHS)[0],
            module(packed)[0].data,
        ):
            if kind == "training":
                torch.autograd.grad(output.sum(), list(module.parameters()))

    with torch.set_grad_enabled(kind == "training"):
        run()  # what is done only once may wait
        torch.cuda.synchronize()
        with unsynchronised():
            run()


@on_cuda
def test_waiting_is_noticed(target: Target) -> None:
    """The switch that the test above stands on."""
    x = target.random(3)
    with unsynchronised(), pytest.raises(RuntimeError, match="synchronizing"):
        x.sum().item()


@on_cuda
@every_cell
def test_another_device_than_the_current_one(target: Target, cell: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, there is {torch.cuda.device_count()}")
    case = target.of(Case(cell, bidirectional=True, hx=True))
    other = replace(case, device="cuda:1")
    assert_same_bits(other.run(other.module()), case.run(case.module()))
    assert torch.cuda.current_device() == 0


@on_cuda
@every_cell
def test_operands_on_two_devices_raise(target: Target, cell: str) -> None:
    module = target.layer(cell, INPUTS, HIDDEN)
    with pytest.raises((ValueError, RuntimeError), match=r"cpu|device"):
        module(torch.randn(T, B, INPUTS))


@on_cuda
def test_out_of_memory_is_an_error_and_no_more(target: Target) -> None:
    module, x = target.layer("lstm", INPUTS, HIDDEN), target.random(T, B, INPUTS)
    expected = module(x)[0]
    _, total = torch.cuda.mem_get_info()
    steps = total // (4 * 4 * HIDDEN * B) + 1  # gx alone would fill the device
    with pytest.raises(torch.OutOfMemoryError):
        module(x[:1].expand(steps, B, INPUTS))
    torch.cuda.empty_cache()
    assert torch.equal(module(x)[0], expected)
