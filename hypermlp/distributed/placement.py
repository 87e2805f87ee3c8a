"""Where FSDP2 splits a parameter."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from hypermlp.distributed.groups import process_group


def along_lags(mesh: DeviceMesh | None = None) -> Callable[[nn.Parameter], Shard | None]:
    """A ``shard_placement_fn`` for ``fully_shard`` that splits tables of few heads along their lags.

    FSDP2 splits along the first dimension. Tables are ``[heads, lags, ...]``: over more processes than heads some
    would hold nothing. A parameter whose first dimension does not divide over the processes, and whose second does, is
    split along the second; all others as ever, for FSDP2 splits unevenly along the first alone.

    Args:
        mesh: as ``fully_shard`` takes it: of one dimension, or of two, the second of which shards (HSDP). None for all
            processes.

    Example:
        >>> fully_shard(block, mesh=mesh, shard_placement_fn=along_lags(mesh))
    """
    if mesh is not None and not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh or None, got {type(mesh).__name__}: make one by init_device_mesh")
    if mesh is not None and mesh.ndim > 2:
        raise ValueError(f"mesh must have one dimension, or two for HSDP, got {mesh.ndim}: choose those of fully_shard")
    world = process_group(None).size() if mesh is None else mesh.size(-1)

    def placement(parameter: nn.Parameter) -> Shard | None:
        shape = parameter.shape
        splits = len(shape) > 1 and shape[0] % world and not shape[1] % world
        return Shard(1) if splits else None

    return placement
