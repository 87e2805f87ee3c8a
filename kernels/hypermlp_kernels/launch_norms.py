"""Host side of the norms that a sum of squares does not hold."""

from __future__ import annotations

from collections.abc import Callable

from hypermlp_kernels.call import Call, MixTensors, aligned, holes, launch_options, mix_constants, strides
from hypermlp_kernels.norms import extreme_norms_kernel
from hypermlp_kernels.tiles import Tile

# small: it fits every device, and nearly all of its programs only read
_TILE = Tile(16, 16, 0, 2, 1)


def extreme_norms(call: Call, routing: MixTensors) -> Callable[[], None]:
    """Of all rows: those that others have put right, or not made yet, are no harm."""
    tile, valid = _TILE, holes(call)
    # of the gate maps alone, which are then made in the accumulator's type
    constants = call.constants(tile)._replace(GLU=False, PACKED=False)
    blocks, num_blocks, programs = call.blocks(tile.rows)

    def launch() -> None:
        extreme_norms_kernel[(num_blocks * programs,)](
            call.q, call.k, *routing, call.rho, blocks, valid,
            *strides(call.q, call.k, routing.gate),
            call.sizes[1], call.max_lag, num_blocks, call.sizes[2], call.q.shape[2], call.options.eps,
            ALIGNED=aligned(call.q, call.k), C=constants, M=mix_constants(call.routing), **launch_options(tile),
        )  # fmt: skip

    return launch
