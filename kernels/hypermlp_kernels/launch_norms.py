"""Host side of the norms that a sum of squares does not hold."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hypermlp_kernels.call import Call, aligned, gate_of, holes, launch_options, mix_constants, strides
from hypermlp_kernels.norms import extreme_norms_kernel
from hypermlp_kernels.tiles import Tile

# small: it fits every device, and nearly all of its programs only read
_TILE = Tile(16, 16, 0, 2, 1)


def extreme_norms(call: Call, scale: Tensor, up: Tensor) -> Callable[[], None]:
    """Of all rows: those that others have put right, or not made yet, are no harm."""
    routing, tile = call.routing, _TILE
    valid, gate = holes(call), gate_of(routing, call.q)
    # of the gate maps alone, which are then made in the accumulator's type
    constants = call.constants(tile)._replace(GLU=False, PACKED=False)
    blocks, num_blocks, programs = call.blocks(tile.rows)

    def launch() -> None:
        extreme_norms_kernel[(num_blocks * programs,)](
            call.q, call.k, scale, up, gate, call.z1, call.rho, blocks, valid,
            *strides(call.q, call.k, gate),
            call.sizes[1], call.max_lag, num_blocks, call.sizes[2], call.q.shape[2], call.eps,
            ALIGNED=aligned(call.q, call.k), C=constants, M=mix_constants(routing), **launch_options(tile),
        )  # fmt: skip

    return launch
