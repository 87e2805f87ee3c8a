"""Which attention modules can be replaced: adapters, found by the class name of the module.

Names and not classes, so that knowing a library does not import it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from torch import nn

from hypermlp.integrations.host import Host
from hypermlp.layers import AttentionLayer

# our own adapters by host class, each in its module of hypermlp.integrations.hosts
_OURS = {
    "GPT2Attention": "gpt2",
    "LlamaAttention": "llama",
    "MistralAttention": "llama",
    "Qwen2Attention": "llama",
    "Qwen3Attention": "llama",
    "GPTNeoXAttention": "gpt_neox",
    "BertSelfAttention": "bert",
    "ViTAttention": "vit",
    "ViTMSNAttention": "vit",
    "DeiTAttention": "vit",
    "Dinov2Attention": "vit",
    "Dinov2WithRegistersAttention": "vit",
    "MultiheadAttention": "torch_nn",
    "Attention": "timm",
    "CausalSelfAttention": "nanogpt",
}

_registered: dict[str, Adapter] = {}


class Adapter(ABC):
    """How one family of attention modules is read, and what stands in its place.

    Example:
        A model whose attention is called as ``attention(x)`` needs only a description::

            class MyAdapter(Adapter):
                def describe(self, module):
                    return Host(hidden_size=module.dim, num_heads=module.heads, max_length=module.context)

            register(MyAdapter(), "MyAttention")
    """

    def at(self, model: nn.Module, name: str) -> Adapter:
        """The adapter for the module called ``name`` in ``model``, where its place says more than it does itself."""
        return self

    @abstractmethod
    def describe(self, module: nn.Module) -> Host:
        """What ``module`` is; ValueError, saying why, for one that cannot be replaced."""

    def wrap(self, layer: AttentionLayer, module: nn.Module, host: Host) -> nn.Module:
        """What takes the place of ``module``: here ``layer`` itself, called with hidden states alone."""
        return layer

    def skip(self, module: nn.Module) -> str | None:
        """Why this module is left as it is (cross-attention, say); None to replace it."""
        return None

    def finish(self, model: nn.Module, swaps: Sequence[Mapping[str, Any]]) -> None:
        """Called when replacements or originals have been put in place.

        Args:
            model: the host model.
            swaps: what stands there now: ``{"layers": [places], "config": {fields of HyperConfig}}``
                for each kind of layer, plain JSON values; empty when all originals are back.
        """
        return


def register(adapter: Adapter, *class_names: str) -> None:
    """Let :func:`swap_attention` know attention classes of these names.

    Args:
        adapter: how they are read and replaced; the last one registered for a name counts.
        class_names: names of classes, such as ``"LlamaAttention"``.
    """
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapter must be an Adapter (an instance), got {adapter!r}")
    if not class_names or not all(isinstance(name, str) for name in class_names):
        raise TypeError(f"class_names must be one or more names of classes, got {class_names!r}")
    _registered.update(dict.fromkeys(class_names, adapter))


def find(module: nn.Module) -> Adapter | None:
    """The adapter of a module, by the name of its class."""
    name = type(module).__name__
    if name not in _registered and name in _OURS:
        import_module(f"hypermlp.integrations.hosts.{_OURS[name]}")
    return _registered.get(name)


def known_classes() -> list[str]:
    """Names of all classes that can be replaced."""
    return sorted({*_OURS, *_registered})
