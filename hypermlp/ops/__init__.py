"""The operator as functions of tensors, ``[B, T, heads, width]`` everywhere."""

from hypermlp.ops.attention import hyper_attention
from hypermlp.ops.mixing import SequenceMix

__all__ = ["SequenceMix", "hyper_attention"]
