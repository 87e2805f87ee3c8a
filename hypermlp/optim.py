"""Which parameters an optimizer treats alike: those that decay, and those that are matrices to Muon."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

from hypermlp.checks import as_number, check_kind
from hypermlp.layers.sequence_mixing import LagMixing

Group = dict[str, Any]
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


class _Groups(NamedTuple):
    matrices: Group
    heads: Group
    tables: Group
    others: Group


class ParameterGroups(_Groups):
    """Groups for an optimizer: ``AdamW(parameter_groups(model))`` takes them all. ``print`` them to see which is where.

    Attributes:
        matrices: weights of linear layers between embeddings and head. They decay, and Muon may take them.
        heads: weights of linear layers that give logits. They decay; Muon is not for them.
        tables: what sequence mixing learns along the lags, which does not decay. It starts small, and at the others'
            learning rate it moves fast for its size: ``groups.tables["lr"] = 0.1 * lr`` gives it one of its own.
        others: all else, which does not decay: convolutions, norms, biases, embeddings, and heads that share an
            embedding's weight. PEFT's adapters of a parameter that is no linear layer's (``target_parameters``: a
            table, a convolution, an embedding, experts) are where that is.
        names: of the parameters, for each group those of its ``"params"`` in their order.
    """

    names: tuple[tuple[str, ...], ...] = ((), (), (), ())

    def _replace(self, **groups: Any) -> ParameterGroups:
        """With other groups; names of as many parameters are kept."""
        made = super()._replace(**groups)
        pairs = zip(made, self.names, strict=True)
        made.names = tuple(names if len(names) == len(group["params"]) else () for group, names in pairs)
        return made

    def __repr__(self) -> str:
        """Each group and its parameters by name; those of equal layers (``blocks.*``) in one line."""
        lines = []
        for kind, group, names in zip(self._fields, self, self.names, strict=True):
            count = sum(parameter.numel() for parameter in group["params"])
            lines.append(f"  {kind}: {count:,} numbers, weight_decay={group.get('weight_decay')}")
            times = Counter(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name) for name in names)
            lines += [f"    {name}" + (f" ({number})" if number > 1 else "") for name, number in times.items()]
        return "\n".join([f"{type(self).__name__}(", *lines, ")"])


def parameter_groups(
    model: nn.Module, *, weight_decay: float = 0.1, heads: Iterable[nn.Module] = ()
) -> ParameterGroups:
    """Every parameter of ``model`` that is trained, once, by how an optimizer should treat it.

    The number of dimensions does not say what is a matrix: the taps of a convolution are ``[channels, taps]``, the
    diagonal of a mixing ``[heads, lags]``, and zero is no natural value for either (a tap starts at one).

    Args:
        model: any model, with our layers or without.
        weight_decay: of ``matrices`` and ``heads``, at least 0.
        heads: further linear layers whose outputs are logits (a classifier, say). Found are those that
            ``get_output_embeddings()`` names, as in Hugging Face models; else the one linear layer, if there is just
            one, from the width of an embedding to its number of entries.

    Returns:
        Four groups, some perhaps empty. An optimizer writes its settings into the groups that it is given: for another
        optimizer make them anew. Call it when the model's parameters are those that are trained: after
        ``swap_attention``, and after ``fully_shard``.

    Raises:
        TypeError: ``model`` is no module, ``weight_decay`` no number, or ``heads`` no list of linear layers.
        ValueError: ``weight_decay`` is negative, or a head is not in ``model``.
    """
    check_kind("model", model, nn.Module, "give the model, not its parameters")
    weight_decay = as_number("weight_decay", weight_decay, zero=True)
    linear = [module for module in model.modules() if _is_linear(module)]
    outer = {id(module) for module in (*_given_heads(model, heads), *_own_heads(model, linear))}
    kinds = _kinds(model, linear, outer)
    groups: dict[str, dict[str, nn.Parameter]] = {name: {} for name in ParameterGroups._fields}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[kinds.get(id(parameter), "others")][name] = parameter
    decays = {"matrices": weight_decay, "heads": weight_decay}
    made = ParameterGroups(
        **{kind: {"params": list(groups[kind].values()), "weight_decay": decays.get(kind, 0.0)} for kind in groups}
    )
    made.names = tuple(tuple(group) for group in groups.values())
    return made


def _kinds(model: nn.Module, linear: list[nn.Module], heads: set[int]) -> dict[int, str]:
    """The group of each parameter that is not one of the others, by its identity."""
    kinds: dict[int, str] = {}
    for module in linear:
        for weight in _own(module):
            # one that several modules share is a head's if one of them is a head
            if id(module) in heads:
                kinds[id(weight)] = "heads"
            else:
                kinds.setdefault(id(weight), "matrices")
    for module in model.modules():
        if isinstance(module, LagMixing):
            kinds |= {id(parameter): "tables" for parameter in module.parameters()}
        elif isinstance(module, _EMBEDDINGS):
            kinds |= {id(weight): "others" for weight in _own(module)}
    for module in model.modules():
        kinds |= {id(weight): kinds.get(id(adapted), "others") for weight, adapted in _adapters(module)}
    return kinds


def _is_linear(module: nn.Module) -> bool:
    """Whether a module's ``weight`` is the matrix of a linear map: ``nn.Linear``, or GPT-2's ``Conv1D``."""
    kind = type(module)
    return isinstance(module, nn.Linear) or (kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."))


def _own(module: Any) -> list[nn.Parameter]:
    """The parameter ``weight``, or what it is computed from under pruning or a parametrisation, if it has its shape."""
    weight = module._parameters.get("weight")
    if weight is not None:
        return [weight]
    names = ("weight_orig", "weight_v", "parametrizations.weight.")
    shape = module.weight.shape
    return [p for name, p in module.named_parameters() if name.startswith(names) and p.shape == shape]


def _adapters(module: Any) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """PEFT's adapters of one parameter that is no layer's (``target_parameters``), each with that parameter."""
    kind = type(module)
    if kind.__name__ == "ParamWrapper" and kind.__module__.startswith("peft."):
        adapted = getattr(module.get_base_layer(), module.parameter_name)
        for name, weight in module.named_parameters():
            if not name.startswith("base_layer."):
                yield weight, adapted


def _given_heads(model: nn.Module, heads: Iterable[nn.Module]) -> list[nn.Module]:
    if isinstance(heads, nn.Module):
        raise TypeError(f"heads must be a list of linear layers, got one {type(heads).__name__}: write heads=[...]")
    if not isinstance(heads, Iterable):
        raise TypeError(f"heads must be a list of linear layers, got {type(heads).__name__}")
    found, inside = list(heads), {id(module) for module in model.modules()}
    for module in found:
        if not isinstance(module, nn.Module) or not _is_linear(module):
            raise TypeError(f"heads must be linear layers, got {type(module).__name__}")
    if missing := sum(id(module) not in inside for module in found):
        raise ValueError(f"heads: {missing} of {len(found)} are no modules of {type(model).__name__}")
    return found


def _own_heads(model: nn.Module, linear: list[nn.Module]) -> list[nn.Module]:
    """What models say, as those of Hugging Face do; else a linear layer from an embedding's width to its count."""
    says: list[Any] = [module for module in model.modules() if hasattr(module, "get_output_embeddings")]
    if says:
        found = [head for head in (module.get_output_embeddings() for module in says) if isinstance(head, nn.Module)]
        # an adapter may hold the head inside
        return [module for head in found for module in head.modules() if _is_linear(module)]
    sizes = {(m.embedding_dim, m.num_embeddings) for m in model.modules() if isinstance(m, _EMBEDDINGS)}
    shapes = [(getattr(m, "in_features", None), getattr(m, "out_features", None)) for m in linear]
    found = [m for m, shape in zip(linear, shapes, strict=True) if shape in sizes and shapes.count(shape) == 1]
    # an adapter is beside the head that it holds
    holders = [module for module in model.modules() if getattr(module, "base_layer", None) in found]
    return [*found, *(module for holder in holders for module in holder.modules() if _is_linear(module))]
