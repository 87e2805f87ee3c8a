"""Hugging Face transformers: what its models ask of an attention module, and saved swapped models."""

from hypermlp.integrations.huggingface.pretrained import from_pretrained, rebuild
from hypermlp.integrations.huggingface.record import record_swaps

__all__ = ["from_pretrained", "rebuild", "record_swaps"]
