"""The chunked path: nothing of size ``T x T``, on any device that PyTorch has."""

from hypermlp.ops.chunked.attend import forward
from hypermlp.ops.chunked.gradient import backward

__all__ = ["backward", "forward"]
