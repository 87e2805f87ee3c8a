"""Which parameters an optimizer treats alike: those that decay, and those that are matrices to Muon."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

Group = dict[str, Any]


class ParameterGroups(NamedTuple):
    """Groups for an optimizer: ``AdamW(parameter_groups(model))`` takes them all.

    Attributes:
        matrices: weights of linear layers between embeddings and head. They decay, and Muon may take them.
        heads: weights of linear layers that give logits. They decay; Muon is not for them.
        others: all else, which does not decay: lag tables, convolutions, norms, biases, embeddings, and heads that
            share an embedding's weight.
    """

    matrices: Group
    heads: Group
    others: Group


def parameter_groups(
    model: nn.Module, *, weight_decay: float = 0.1, heads: Iterable[nn.Module] = ()
) -> ParameterGroups:
    """Every parameter of ``model`` that is trained, once, by how an optimizer should treat it.

    The number of dimensions does not say what is a matrix: the taps of a convolution are ``[channels, taps]``, the
    diagonal of a mixing ``[heads, lags]``, and zero is no natural value for either (a tap starts at one).

    Args:
        model: any model, with our layers or without.
        weight_decay: of ``matrices`` and ``heads``, at least 0.
        heads: further linear layers whose outputs are logits (a classifier, say). Those as wide as the vocabulary
            of an embedding of the model are found.

    Returns:
        Three groups, some perhaps empty. Call it when the model's parameters are those that are trained: after
        ``swap_attention``, and after ``fully_shard``.

    Raises:
        TypeError: ``model`` is no module, or ``heads`` holds something else than linear layers.
        ValueError: ``weight_decay`` is negative, or a head is not in ``model``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}: give the model, not its parameters")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
    modules = list(model.modules())
    outer = {id(module) for module in _linear(heads, "heads")}
    if missing := outer - {id(module) for module in modules}:
        raise ValueError(f"heads: {len(missing)} of {len(outer)} are no modules of {type(model).__name__}")
    embeddings = [module for module in modules if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
    vocabularies = {module.num_embeddings for module in embeddings}
    shared = {id(module.weight) for module in embeddings}
    kinds: dict[int, str] = {}
    for module in modules:
        if not is_linear(module) or id(module.weight) in shared:
            continue
        # a weight that several modules share is a head if one of them is
        if id(module) in outer or getattr(module, "out_features", None) in vocabularies:
            kinds[id(module.weight)] = "heads"
        else:
            kinds.setdefault(id(module.weight), "matrices")
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in ParameterGroups._fields}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[kinds.get(id(parameter), "others")].append(parameter)
    decays = {"matrices": weight_decay, "heads": weight_decay, "others": 0.0}
    return ParameterGroups(**{name: {"params": groups[name], "weight_decay": decays[name]} for name in groups})


def is_linear(module: nn.Module) -> bool:
    """Whether a module's ``weight`` is the matrix of a linear map: ``nn.Linear``, or GPT-2's ``Conv1D``."""
    kind = type(module)
    conv1d = kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
    return isinstance(module, nn.Linear) or conv1d


def _linear(modules: Iterable[nn.Module], name: str) -> list[nn.Module]:
    found = list(modules)
    for module in found:
        if not isinstance(module, nn.Module) or not is_linear(module):
            raise TypeError(f"{name} must be linear layers, got {type(module).__name__}")
    return found
