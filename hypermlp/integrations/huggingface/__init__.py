"""Hugging Face transformers: what its models ask of an attention module, and saved swapped models."""

from hypermlp.integrations.huggingface.pretrained import from_pretrained, rebuild

__all__ = ["from_pretrained", "rebuild"]
