"""rnnkern: recurrent layers for PyTorch on fused kernels, in place of torch.nn's LSTM, GRU and RNN."""

from rnnkern import functional
from rnnkern.conversion import convert, to_torch
from rnnkern.keras import from_keras, init_keras_, to_keras_weights
from rnnkern.modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "__version__",
    "convert",
    "from_keras",
    "functional",
    "init_keras_",
    "to_keras_weights",
    "to_torch",
]
