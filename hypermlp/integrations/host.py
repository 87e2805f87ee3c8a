"""What is known of an attention module of somebody else's model, before it is replaced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from hypermlp.checks import named_fields

# what hyper layers can be made in
_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# what scores have besides products of projections, in several libraries
RELATIVE = "its scores carry biases by relative position, which a hyper layer's tables learn anew"
ALIBI = "its scores carry biases by distance (ALiBi), which a hyper layer's tables learn anew"

Found = TypeVar("Found")


class Projection(NamedTuple):
    """A linear map from hidden states to several heads.

    Attributes:
        weight: ``[heads, width, hidden_size]``.
        bias: ``[heads, width]`` or None.
    """

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, heads: int) -> Projection:
        """From a linear layer's ``[heads * width, hidden_size]`` and ``[heads * width]``."""
        return cls(weight.reshape(heads, -1, weight.shape[1]), None if bias is None else bias.reshape(heads, -1))

    @classmethod
    def of_joint(
        cls, weight: Tensor, bias: Tensor | None, heads: int, key_heads: int | None = None
    ) -> tuple[Projection, Projection, Projection]:
        """Query, key and value, one after the other in one linear layer.

        ``weight`` is ``[(heads + 2 * key_heads) * width, hidden_size]``; ``key_heads`` None is for as many as heads.
        """
        counts = [heads, key_heads or heads, key_heads or heads]
        query, key, value = cls.of(weight, bias, sum(counts))._split(counts, 0)
        return query, key, value

    @classmethod
    def of_heads(
        cls, weight: Tensor, bias: Tensor | None, heads: int, key_heads: int | None = None
    ) -> tuple[Projection, Projection, Projection]:
        """The queries that share the first key and value, then those, then the same of the second, and so on.

        ``weight`` is ``[key_heads * (heads / key_heads + 2) * width, hidden_size]``; ``key_heads`` None is for as many
        as ``heads``.
        """
        groups = key_heads or heads
        together, shares = cls.of(weight, bias, groups), [heads // groups, 1, 1]
        width = together.weight.shape[1] // sum(shares)
        query, key, value = together._split([share * width for share in shares], 1)
        return query.each(lambda x: x.reshape(heads, width, *x.shape[2:])), key, value

    def _split(self, sizes: list[int], dim: int) -> list[Projection]:
        biases = [None] * len(sizes) if self.bias is None else self.bias.split_with_sizes(sizes, dim)
        return [Projection(*part) for part in zip(self.weight.split_with_sizes(sizes, dim), biases, strict=True)]

    def expanded(self, heads: int) -> Projection:
        """Each of fewer heads as often as query heads share it (grouped keys), ``heads`` in all."""
        times = heads // self.weight.shape[0]
        return self if times == 1 else self.each(lambda x: x.repeat_interleave(times, 0))

    def each(self, change: Callable[[Tensor], Tensor]) -> Projection:
        """With ``change`` of the weight and, if there is one, of the bias."""
        return Projection(change(self.weight), None if self.bias is None else change(self.bias))


class Projections(NamedTuple):
    """The four projections of a softmax attention layer; scores are ``scaling * q . k``.

    Attributes:
        query, key, value: keys and values may have fewer heads than queries.
        output: weight ``[hidden_size, heads * width]`` and bias ``[hidden_size]`` or None; None if
            the module has no output projection.
        scaling: factor of the scores.
    """

    query: Projection
    key: Projection
    value: Projection
    output: tuple[Tensor, Tensor | None] | None
    scaling: float

    @classmethod
    def of_joint(
        cls, weight: Tensor, bias: Tensor | None, output: Any, heads: int, scaling: float, key_heads: int | None = None
    ) -> Projections:
        """With query, key and value as in :meth:`Projection.of_joint`, and a linear layer or None as ``output``."""
        parts = Projection.of_joint(weight, bias, heads, key_heads)
        return cls(*parts, None if output is None else (output.weight, output.bias), scaling)


@named_fields
@dataclass(frozen=True)
class Host:
    """One attention module of a host model, as its adapter describes it.

    Attributes:
        hidden_size: width of the module's input and output.
        num_heads: query heads.
        causal: whether later tokens are hidden.
        either_way: whether the module leaves that to its masks: ``causal`` is then an option of the
            swap, and the field above its default.
        layer_idx: place in the model's cache, if it has one.
        max_length: tokens the model can see; None if it does not say, and ``max_lag`` must be told.
        window: tokens a query sees where the host has a sliding window.
        output_projection: whether the module projects its output. If not (BERT), the replacement
            does not either.
        rope_theta: base of the rotary frequencies where queries and keys are rotated in full.
        output_dropout: probability of dropout after the output projection, inside the module.
        projections: reads the weights, for ``init="from_attention"``; None if that is not offered.
        not_offered: why it is not, for the message and, as what a hyper layer does otherwise, for the report.
        notes: what else the module does that its replacement does not, or does for several places, for the report.
    """

    hidden_size: int
    num_heads: int
    causal: bool = True
    either_way: bool = False
    layer_idx: int | None = None
    max_length: int | None = None
    window: int | None = None
    output_projection: bool = True
    rope_theta: float | None = None
    output_dropout: float = 0.0
    projections: Callable[[], Projections] | None = None
    not_offered: str = ""
    notes: tuple[str, ...] = ()

    @property
    def differences(self) -> tuple[str, ...]:
        """What a user of the swapped model should know, in words."""
        scores = (self.not_offered,) if self.not_offered and self.projections is None else ()
        return scores + self.notes


def nearest(model: nn.Module, name: str, read: Callable[[Any], Found | None]) -> Found | None:
    """What ``read`` finds on the nearest module of ``model`` that holds the one called ``name``; None if nowhere."""
    parts = name.split(".")
    around = (model.get_submodule(".".join(parts[:depth])) for depth in reversed(range(len(parts))))
    return next((found for found in map(read, around) if found is not None), None)


def learned_positions(model: nn.Module, name: str, width: int) -> int | None:
    """Rows of the nearest table of learned positions around the module called ``name``; None for none, or several."""

    def read(host: Any) -> int | None:
        tables = dict(host.named_parameters(recurse=False))
        tables |= {key: child.weight for key, child in host.named_children() if isinstance(child, nn.Embedding)}
        found = {
            table.numel() // width
            for key, table in tables.items()
            if "pos" in key.lower() and table.ndim > 1 and table.shape[-1] == width
        }
        return found.pop() if len(found) == 1 else None

    return nearest(model, name, read)


def placement(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a module's weights; ValueError where they are not plain numbers of one kind."""
    if any(type(part).__module__.startswith("peft.") for part in module.modules()):
        raise ValueError("it carries PEFT adapters, which would be lost: swap first, or merge_and_unload() them")
    if away := weights_away(module):
        raise ValueError(away)
    if what := _quantised(module):
        raise ValueError(
            f"the weights of {type(module).__name__} are quantised ({what}), and a layer that is trained or starts "
            "from them needs plain numbers, for which only bitsandbytes, torchao and optimum-quanto are asked: swap "
            "before quantising, or dequantise it (model.dequantize())"
        )
    kinds = {(parameter.device, parameter.dtype) for parameter in module.parameters() if parameter.ndim > 1}
    if len(kinds) != 1:
        raise ValueError(
            f"the weights of {type(module).__name__} are in {len(kinds)} places or dtypes, {sorted(map(str, kinds))}: "
            "bring each attention module to one device and dtype first"
        )
    return kinds.pop()


def common_dtype(model: nn.Module) -> torch.dtype:
    """Of most of a model's plain weights and biases, which its activations have."""
    counts = Counter(p.dtype for p in model.parameters() if type(p) is nn.Parameter and p.dtype in _PLAIN)
    return counts.most_common(1)[0][0] if counts else torch.get_default_dtype()


def _quantised(module: nn.Module) -> str | None:
    """How a module's weights are kept, where that is no matrix of plain numbers; else None."""
    weights = {name: parameter for name, parameter in module.named_parameters() if parameter.ndim > 1}
    for name, weight in weights.items():
        kind = type(weight)
        if weight.dtype not in _PLAIN:
            return f"{name} is {weight.dtype}"
        if not f"{kind.__module__}.".startswith("torch."):
            return f"{name} is a {kind.__module__}.{kind.__qualname__}"
    packed = [name for name, buffer in module.named_buffers() if buffer.ndim > 1 and not buffer.is_floating_point()]
    return f"there are no weights, and integers in {packed[0]}" if packed and not weights else None


def weights_away(module: nn.Module) -> str | None:
    """What to do where accelerate keeps a module's weights elsewhere, or each process has its share; else None."""
    weights = list(module.parameters())
    if any(weight.is_meta for weight in weights) and any(hasattr(part, "_hf_hook") for part in module.modules()):
        return (
            "accelerate has offloaded its weights: accelerate.hooks.remove_hook_from_submodules(model) brings them "
            "back; offload again afterwards. If they were loaded offloaded, load them without that"
        )
    if any(type(weight).__name__ == "DTensor" for weight in weights):
        return "its weights are sharded (DTensor): swap and restore before fully_shard or parallelize_module"
    return None


class NoProjection(nn.Identity):
    """Stands for an output projection that the host makes itself."""

    def reset_parameters(self) -> None:
        """Nothing to start."""
