"""Attention layers a model is built from: ``[B, T, hidden_size]`` to ``[B, T, hidden_size]``."""

from hypermlp.config import HyperConfig
from hypermlp.layers.base import AttentionLayer
from hypermlp.layers.baselines import ReLUAttention, SoftmaxAttention
from hypermlp.layers.factory import build_layer
from hypermlp.layers.hyper import HyperGLU, HyperMLP

__all__ = ["AttentionLayer", "HyperConfig", "HyperGLU", "HyperMLP", "ReLUAttention", "SoftmaxAttention", "build_layer"]
