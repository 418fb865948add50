"""What a layer may be asked for beyond torch.nn: one frozen record, its checks and its text.

The equations of each are in reference_cells.py, what they cost and where they come from in docs/options.md.
"""

from numbers import Real
from typing import Any, NamedTuple

from rnnkern.cells import CellSpec

Zoneout = float | tuple[float, float]


class Options(NamedTuple):
    """The options of a layer or stack of layers; each as it is here where nobody asks."""

    input_dropout: float = 0.0
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    zoneout: Zoneout = 0.0  # of h and c, or (of h, of c)
    layer_norm: bool = False
    peephole: bool = False
    reset_after: bool = True
    recompute: bool = False

    def zones(self, cell: CellSpec) -> tuple[float, float]:
        """The probabilities with which h and c keep their old values."""
        if isinstance(self.zoneout, tuple):
            return self.zoneout
        return self.zoneout, self.zoneout if cell.has_c else 0.0

    def shares(self, cell: CellSpec, training: bool) -> tuple[float, float]:
        """The shares of the old values in h and c outside of training, where masks choose between old and new."""
        return (0.0, 0.0) if training else self.zones(cell)

    def at_work(self, training: bool, graded: bool) -> "Options":
        """Those that do something in this call: dropout in training alone, recompute where there will be gradients.
        The very record `PLAIN` where nothing is left."""
        left = self
        if not training:
            left = left._replace(input_dropout=0.0, recurrent_dropout=0.0, weight_dropout=0.0)
        if not graded:
            left = left._replace(recompute=False)
        return PLAIN if left == PLAIN else left

    def changed(self) -> dict[str, Any]:
        """Those that are not as they are by default."""
        return {name: value for name, value in self._asdict().items() if value != PLAIN._asdict()[name]}

    def text(self) -> str:
        """Those of `changed` as arguments behind others."""
        return "".join(f", {name}={value!r}" for name, value in self.changed().items())


PLAIN = Options()  # this very record wherever nothing is asked for, so that calls need not compare
_KINDS = tuple(map(type, PLAIN))

PROBABILITIES = ("input_dropout", "recurrent_dropout", "weight_dropout", "zoneout")
# Weights come and go with these: they are settled when a module is made.
OF_WEIGHTS = ("layer_norm", "peephole")
# The modules for which an option means something, where it is not all of them, and why.
MEANT_FOR: dict[str, tuple[tuple[str, ...], str]] = {
    "peephole": (("LSTM",), "only an LSTM has a c for its gates to see"),
    "reset_after": (("GRU",), "only a GRU has a reset gate to put before the product"),
    "recompute": (("LSTM", "GRU"), "a plain RNN keeps nothing but its output for backward anyway"),
}


def kind_of(mode: str) -> str:
    """LSTM, GRU or RNN, from torch.nn.RNNBase's name of the cell."""
    return mode.partition("_")[0]


def cell_name(mode_name: str, options: Options) -> str:
    """The cell that computes what the options ask for, from the one that torch.nn has."""
    return mode_name if options.reset_after else f"{mode_name}_reset_before"


def looks_plain(options: Options) -> bool:
    """Whether unchecked options are the defaults. Types come first: a value may be anything, and need not compare."""
    return tuple(map(type, options)) == _KINDS and options == PLAIN


def checked(kind: str, options: Options) -> Options:
    """The options of an LSTM, GRU or RNN, numbers as floats.

    Raises:
        ValueError: a probability that is none, or an option that has no meaning here.
        TypeError: a switch that is no bool.
    """
    for name, value in options._asdict().items():
        if name not in PROBABILITIES and not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {value!r}")
    for name, (kinds, why) in MEANT_FOR.items():
        if kind not in kinds and getattr(options, name) != getattr(PLAIN, name):
            raise ValueError(f"{name}: {why}, got {name}={getattr(options, name)} for {kind}; leave {name} out")
    if options.layer_norm and not options.reset_after:
        raise ValueError(
            "layer_norm: LayerNorm of W_hh h is not defined with reset_after=False, whose last gate has another "
            "product; leave one of the two out"
        )
    found = options._replace(
        input_dropout=_probability("input_dropout", options.input_dropout),
        recurrent_dropout=_probability("recurrent_dropout", options.recurrent_dropout),
        weight_dropout=_probability("weight_dropout", options.weight_dropout),
        zoneout=_zoneout(kind, options.zoneout),
    )
    return PLAIN if found == PLAIN else found


def _probability(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise ValueError(f"{name}: expected a probability, a number from 0 to 1, got {value!r}")
    return float(value)


def _zoneout(kind: str, value: Any) -> Zoneout:
    if not isinstance(value, tuple | list):
        return _probability("zoneout", value)
    if kind != "LSTM":
        raise ValueError(f"zoneout: only an LSTM has a c beside h: expected a number for {kind}, got {value!r}")
    if len(value) != 2:
        raise ValueError(f"zoneout: expected a number, or a pair for h and c, got {value!r}")
    of_h, of_c = _probability("zoneout of h", value[0]), _probability("zoneout of c", value[1])
    return of_h if of_h == of_c else (of_h, of_c)


class Option:
    """An option as an attribute of a module, read from its record `options` and, where no weight hangs on it,
    changeable there."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: Any, owner: type) -> Any:
        return self if module is None else getattr(module.options, self.name)

    def __set__(self, module: Any, value: object) -> None:
        if self.name in OF_WEIGHTS and value != getattr(module.options, self.name):
            new = f"{type(module).__name__} with {self.name}={value!r}"
            raise AttributeError(f"{self.name}: weights hang on it; make a new {new}")
        module.options = checked(kind_of(module.mode), module.options._replace(**{self.name: value}))
