"""Hugging Face transformers: what its models ask of an attention module."""
