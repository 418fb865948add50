"""What is compared on a case: rnnkern without the option, twice, with it, and the step loop that computes the same."""

from typing import Any

import torch
from torch import Tensor, nn

import rnnkern
from benchmarks.option_loops import Loop, all_named
from benchmarks.option_table import RESET_SHARE, Case, Option
from benchmarks.results import PLAIN, PLAIN_AGAIN, RNNKERN, TORCH
from benchmarks.rivals import SPECS, ModuleRival, Problem, Rival, build, rnnkern_rival
from rnnkern import functional

# LayerNorm's first weight for h W_hh. With 1 an LSTM is chaotic: rounding grows tenfold in some 50 steps, and two right
# results in float32 are 2e-3 apart after 200.
RECURRENT_GAIN = 0.3
NONE = Option("none")
SEED = 1  # of the masks on which rivals are compared, and of the parameters that torch.nn's module lacks


class OptionRival(ModuleRival):
    """A layer of rnnkern's with an option, or its loop."""

    def __init__(self, module: nn.Module, problem: Problem, mode: str, option: Option) -> None:
        super().__init__(module, problem, mode, packed=False)
        self.options = call_arguments(module, problem, option)

    def results(self) -> dict[str, Tensor]:
        """Those for the masks of a seed, which are the same for all."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return super().results()


class FunctionRival(OptionRival):
    """rnnkern's function, which can return all states."""

    def forward(self) -> tuple[Tensor, Any]:
        """Output, and the states that it gives by name."""
        function: Any = getattr(functional, self.problem.cell)
        layer: Any = self.module
        output, *found = function(self.x, None, layer.all_weights, backend=layer.backend, **self.options)
        pairs = (states if isinstance(states, tuple) else (states,) for states in found)
        return output, all_named(*pairs)


def call_arguments(module: Any, problem: Problem, option: Option) -> dict[str, Any]:
    """What the option adds to a call."""
    arguments: dict[str, Any] = {}
    if option.resets:
        shape, generator = problem.x.shape[:2], torch.Generator().manual_seed(SEED)
        arguments["reset"] = torch.rand(shape, generator=generator) < RESET_SHARE
    if option.learned:
        arguments["reset_to"] = (module.start_h, module.start_c) if problem.cell == "lstm" else module.start_h
    return arguments | ({"return_states": True} if option.returns_states else {})


def make_layer(problem: Problem, option: Option, backend: str) -> nn.Module:
    """rnnkern's layer with the problem's weights; those that torch.nn lacks, and a learned state, are drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        layer = build(rnnkern, problem.cell, problem.shape, problem.x.dtype, backend=backend, **option.arguments)
        for name in ("start_h", "start_c")[: SPECS[problem.cell].states * option.learned]:
            layer.register_parameter(name, nn.Parameter(torch.randn(1, 1, problem.shape.H, dtype=problem.x.dtype)))
    layer.load_state_dict(problem.module.state_dict(), strict=False)
    if option.arguments.get("layer_norm"):
        nn.init.constant_(layer.get_parameter("ln_hh_weight_l0"), RECURRENT_GAIN)
    return layer


def make_rivals(problem: Problem, case: Case, mode: str, backend: str) -> dict[str, Rival]:
    """All that is timed on a case, by name. What only the function has is compared with the function."""
    option = case.option
    layer = make_layer(problem, option, backend)
    kind = FunctionRival if option.returns_states else OptionRival

    def plain() -> Rival:
        if option.returns_states:
            return FunctionRival(make_layer(problem, NONE, backend), problem, mode, NONE)
        return rnnkern_rival(problem, mode, backend)

    rivals: dict[str, Rival] = {PLAIN: plain(), PLAIN_AGAIN: plain(), RNNKERN: kind(layer, problem, mode, option)}
    return rivals | ({TORCH: OptionRival(Loop(layer), problem, mode, option)} if case.has_loop else {})
