"""Bytes that one process sends for a layer over several, in closed form. They go out forward, and as many backward."""

from __future__ import annotations

from hypermlp.budget.counts import described
from hypermlp.checks import as_integer, as_sizes
from hypermlp.config import HyperConfig


def count_sequence_bytes(
    config: HyperConfig, batch_size: int, length: int, *, itemsize: int = 2, processes: int = 2
) -> int:
    """Of ``shard_sequence``: keys and values to all others or, of short windows, to neighbours; convolutions' inputs.

    Args:
        config: of the layer.
        batch_size: sequences.
        length: tokens of each, over all processes.
        itemsize: bytes of an activation.
        processes: ``W``, which share each sequence. The first and the last of them have one neighbour, and send less.
    """
    c = described(config)
    batch_size, length, itemsize, processes = as_sizes(
        batch_size=batch_size, length=length, itemsize=itemsize, processes=processes
    )
    neighbours, chunk = min(processes - 1, 2), length // (2 * processes)
    numbers = neighbours * max(c.conv_size - 1, 0) * c.hidden_size
    if sends_to_neighbours(c, chunk):
        assert c.window is not None
        numbers += neighbours * (c.window - 1) * (c.qk_dim + c.v_dim)
    else:
        numbers += (processes - 1) * 2 * chunk * (c.qk_dim + c.v_dim)
    return itemsize * batch_size * numbers


def count_heads_bytes(
    config: HyperConfig, batch_size: int, length: int, *, itemsize: int = 2, processes: int = 2
) -> int:
    """Of ``shard_heads``: the sum of ``[B, T, hidden_size]`` by a ring; the small gradients of taps are left out."""
    described(config)
    batch_size, length, itemsize, processes = as_sizes(
        batch_size=batch_size, length=length, itemsize=itemsize, processes=processes
    )
    return ring_bytes(2 * itemsize * batch_size * length * config.hidden_size, processes)


def ring_bytes(size: int, processes: int) -> int:
    """What one process sends to gather, or to sum and scatter, ``size`` bytes; a sum that all have takes both."""
    size, processes = as_integer("size", size, 0), as_integer("processes", processes, 1)
    return size * (processes - 1) // processes


def sends_to_neighbours(config: HyperConfig, chunk: int) -> bool:
    """Whether ``shard_sequence`` takes keys from neighbours alone: the window is no longer than a chunk and a token."""
    return config.window is not None and config.window - 1 <= chunk
