"""Bridges to other libraries and to other people's checkpoints, one small file each."""

from hypermlp.integrations.host import Host, Projection, Projections
from hypermlp.integrations.positions import resize_positions
from hypermlp.integrations.registry import Adapter, register, unregister
from hypermlp.integrations.swap import restore_attention, swap_attention
from hypermlp.integrations.swap_report import SwapReport

__all__ = [
    "Adapter",
    "Host",
    "Projection",
    "Projections",
    "SwapReport",
    "register",
    "resize_positions",
    "restore_attention",
    "swap_attention",
    "unregister",
]
