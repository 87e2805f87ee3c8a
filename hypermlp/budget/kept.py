"""Memory that a forward leaves for its backward, in closed form, a layer or block at a time.

The terms are what PyTorch's autograd saves of the layer's own equations (``layers/streams.py``): the input of every
linear map, both sides of every product of two activations, and what the operator saves: its arguments, and
in float32 its output and the statistics ``z1``, ``rho``, ``z2`` (``docs/mathematics.md``). Parameters are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypermlp.budget.counts import described, mixings
from hypermlp.budget.traffic import sends_to_neighbours
from hypermlp.checks import as_flag, as_integer, as_sizes
from hypermlp.config import HyperConfig

# what statistics and norms are computed in, if the activations are not more precise
_STATISTICS = 4


@dataclass(frozen=True)
class Kept:
    """Bytes that one forward keeps for its backward.

    Attributes:
        operator: queries, keys, values, output and statistics.
        rest: all else of the layer or block.
    """

    operator: int
    rest: int

    @property
    def total(self) -> int:
        return self.operator + self.rest


def count_kept(config: HyperConfig, batch_size: int, length: int, *, itemsize: int = 2, processes: int = 1) -> Kept:
    """Of the layer that ``config`` describes, its input included, with the fused short convolution.

    Args:
        config: of the layer.
        batch_size: sequences ``B``.
        length: tokens ``T`` of each, over all processes.
        itemsize: bytes of an activation: 2 in bfloat16, 4 in float32.
        processes: ``W`` of ``shard_sequence``; the bytes are one process's, which has ``T / W`` rows. Keys and
            values are kept as they were gathered, all ``T`` of them, unless the window is no longer than a chunk.

    Raises:
        ValueError: if a size is not positive, the length does not divide, or it is softmax attention with a mask, whose
            memory is that of PyTorch's kernel (a window, or more than one process).
    """
    c = described(config)
    batch_size, length, itemsize, processes = as_sizes(
        batch_size=batch_size, length=length, itemsize=itemsize, processes=processes
    )
    if length % (2 * processes) and processes > 1:
        raise ValueError(f"length={length} does not divide into {2 * processes} chunks: pad it to a multiple")
    softmax = c.mixer == "softmax"
    if softmax and (processes > 1 or c.max_lag is not None):
        raise ValueError("what softmax attention keeps is known without a mask alone: leave max_lag and processes out")
    rows, statistic = length // processes, max(itemsize, _STATISTICS)
    # convolutions see the rows before both chunks, in a copy
    wide = rows + 2 * max(c.conv_size - 1, 0) if processes > 1 else rows

    queries = rows * c.qk_dim
    pairs = _keys_kept(c, rows, processes) * (c.qk_dim + c.v_dim)
    output = rows * c.v_dim
    if softmax:
        operator = itemsize * (queries + pairs + output) + statistic * rows * c.num_heads
    else:
        numbers = c.num_heads + sum(mix.rank * heads for mix, heads in mixings(c))
        operator = itemsize * (queries + pairs) + statistic * (output + rows * numbers)

    rest = rows * (c.hidden_size + sum(c.gate_widths))
    if c.q_gate:
        rest += queries
    if c.conv_size:
        rest += 2 * wide * c.hidden_size  # which the key and value projections take
        if processes > 1:
            rest += wide * c.hidden_size
    if c.output_gate:
        rest += output
    if processes > 1 or (statistic > itemsize and not softmax):
        rest += output  # the operator's, joined or rounded
    rotations = (rows + wide) * c.qk_width if c.rope else 0  # cosines and sines, of queries and of keys
    return Kept(batch_size * operator, itemsize * (batch_size * rest + rotations))


def count_block_kept(
    config: HyperConfig,
    intermediate_size: int,
    batch_size: int,
    length: int,
    *,
    itemsize: int = 2,
    processes: int = 1,
    fused_norm: bool = True,
) -> Kept:
    """Of a pre-norm block: the layer, a SwiGLU, and two RMSNorms.

    Args:
        config, batch_size, length, itemsize, processes: see :func:`count_kept`.
        intermediate_size: width inside the SwiGLU.
        fused_norm: whether the norms are PyTorch's fused kernel, as on a GPU, which keeps its input and a
            number a row; on a CPU they keep the input and the quotient, both in float32.
    """
    described(config)
    intermediate_size = as_integer("intermediate_size", intermediate_size, 1)
    layer = count_kept(config, batch_size, length, itemsize=itemsize, processes=processes)
    batch_size, length, itemsize, processes = as_sizes(
        batch_size=batch_size, length=length, itemsize=itemsize, processes=processes
    )
    rows, fused_norm = batch_size * length // processes, as_flag("fused_norm", fused_norm)
    norm = count_norm_kept(config.hidden_size, rows, itemsize=itemsize, fused=fused_norm)
    mlp = itemsize * rows * (config.hidden_size + 4 * intermediate_size)
    return Kept(layer.operator, layer.rest + mlp + 2 * norm)


def count_norm_kept(hidden_size: int, rows: int, *, itemsize: int = 2, fused: bool = True) -> int:
    """Bytes of an RMSNorm over ``rows`` tokens, see :func:`count_block_kept`."""
    hidden_size, itemsize = as_sizes(hidden_size=hidden_size, itemsize=itemsize)
    rows, fused = as_integer("rows", rows, 0), as_flag("fused", fused)
    statistic = max(itemsize, _STATISTICS)
    return rows * (statistic + (itemsize if fused else 2 * statistic) * hidden_size)


def _keys_kept(c: HyperConfig, rows: int, processes: int) -> int:
    """Tokens whose keys and values one process keeps."""
    if processes > 1 and c.window is not None and sends_to_neighbours(c, rows // 2):
        return rows + 2 * (c.window - 1)
    return rows * processes
