"""rnnkern: recurrent layers for PyTorch on fused kernels, in place of torch.nn's LSTM, GRU and RNN."""

from rnnkern import functional
from rnnkern.conversion import convert, to_torch
from rnnkern.modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

__version__ = "0.1.0"

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell", "__version__", "convert", "functional", "to_torch"]
