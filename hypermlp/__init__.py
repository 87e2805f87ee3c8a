"""HyperMLP and HyperGLU: drop-in attention layers for PyTorch (Lu & Yang, arXiv 2602.12601)."""

from typing import TYPE_CHECKING, Any

from hypermlp.cache import HyperCache
from hypermlp.config import HyperConfig, MixConfig
from hypermlp.layers import HyperGLU, HyperMLP, ReLUAttention, SoftmaxAttention, build_layer
from hypermlp.ops import SequenceMix, hyper_attention
from hypermlp.optim import ParameterGroups, parameter_groups

if TYPE_CHECKING:
    from hypermlp.integrations import restore_attention, swap_attention
    from hypermlp.models import extend_max_lag

__version__ = "0.1.0"

__all__ = [
    "HyperCache",
    "HyperConfig",
    "HyperGLU",
    "HyperMLP",
    "MixConfig",
    "ParameterGroups",
    "ReLUAttention",
    "SequenceMix",
    "SoftmaxAttention",
    "build_layer",
    "extend_max_lag",
    "hyper_attention",
    "parameter_groups",
    "restore_attention",
    "swap_attention",
]


def __getattr__(name: str) -> Any:
    """What needs more than the layers, loaded when it is first asked for."""
    if name in ("restore_attention", "swap_attention"):
        from hypermlp import integrations

        return getattr(integrations, name)
    if name == "extend_max_lag":
        from hypermlp.models import extend_max_lag

        return extend_max_lag
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
