"""The operator as functions of tensors, ``[B, T, heads, width]`` everywhere."""

from hypermlp.ops.arguments import SequenceMix
from hypermlp.ops.attention import hyper_attention

__all__ = ["SequenceMix", "hyper_attention"]
