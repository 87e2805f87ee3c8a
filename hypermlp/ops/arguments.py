"""The operator's arguments, once: as every path takes them, and flat as PyTorch's dispatcher does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from hypermlp.ops.varlen import Tokens, key_spans
from hypermlp_kernels.arguments import Gradients, MixGradients, MixNeeds, Needs, Options, SequenceMix

__all__ = ["Gradients", "MixGradients", "MixNeeds", "Needs", "OperatorArgs", "Options", "Outputs", "SequenceMix"]

# a mixing's tensors by the names that exported programs hold them under, where the core is a gate
_MIX_TENSORS = ("diag", "down", "up", "gate")
_MIXES = {f"{mix}_{field}": "Tensor?" for mix in ("routing", "readout") for field in _MIX_TENSORS}
# name and type of each flat argument: exported programs hold them by these names and in this order
SCHEMA: dict[str, str] = {
    "q": "Tensor", "k": "Tensor", "v": "Tensor", **_MIXES,
    "attention_mask": "Tensor?", "cu_seqlens": "Tensor?",
    "routing_identity": "bool", "readout_identity": "bool",
    "selection": "str", "norm": "bool", "eps": "float", "causal": "bool", "layout": "str", "max_lag": "SymInt?",
}  # fmt: skip
# those that may have a gradient, in the order of Gradients.flat
DIFFERENTIABLE = ("q", "k", "v", *_MIXES)


def signature(arguments: Mapping[str, str]) -> str:
    """``{"q": "Tensor", ...}`` as a schema of PyTorch writes it."""
    return ", ".join(f"{kind} {name}" for name, kind in arguments.items())


def mixing(flat: Mapping[str, Any], name: str) -> SequenceMix:
    """The mixing ``"routing"`` or ``"readout"`` of flat arguments by name."""
    return SequenceMix(*(flat[f"{name}_{field}"] for field in (*_MIX_TENSORS, "identity")))


class OperatorArgs(NamedTuple):
    """What the operator computes with. ``q`` and the cores may be of the last tokens alone."""

    q: Tensor
    k: Tensor
    v: Tensor
    routing_mix: SequenceMix
    readout_mix: SequenceMix
    tokens: Tokens
    options: Options

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What may have a gradient, in the order of :attr:`Gradients.flat`."""
        return (self.q, self.k, self.v, *self.routing_mix.tensors, *self.readout_mix.tensors)

    @property
    def past(self) -> int:
        """Tokens that are keys alone: the queries are of those after them."""
        return self.k.shape[1] - self.q.shape[1]

    def spans(self) -> tuple[Tensor, Tensor]:
        """The keys that each token's query sees, see :func:`hypermlp.ops.varlen.key_spans`."""
        return key_spans(
            self.k.shape[1], causal=self.options.causal, max_lag=self.options.window,
            cu_seqlens=self.tokens.cu_seqlens, device=self.k.device,
        )  # fmt: skip

    def map_streams(self, change: Callable[[Tensor], Tensor]) -> OperatorArgs:
        """With ``change`` of all that lies along the tokens; tables stay, which are parameters, and small."""
        routing, readout = (
            mix if mix.core is None else mix._replace(core=change(mix.core))
            for mix in (self.routing_mix, self.readout_mix)
        )
        return self._replace(
            q=change(self.q), k=change(self.k), v=change(self.v), routing_mix=routing, readout_mix=readout
        )

    def flatten(self) -> tuple[Any, ...]:
        """In the order of ``SCHEMA``."""
        identities = self.routing_mix.identity, self.readout_mix.identity
        return (*self.tensors, self.tokens.valid, self.tokens.cu_seqlens, *identities, *self.options)

    @classmethod
    def unflatten(cls, flat: Sequence[Any]) -> OperatorArgs:
        """What :meth:`flatten` gave."""
        named = dict(zip(SCHEMA, flat, strict=True))
        return cls(
            named["q"], named["k"], named["v"], mixing(named, "routing"), mixing(named, "readout"),
            Tokens(named["attention_mask"], named["cu_seqlens"]),
            Options(*(named[field] for field in Options._fields)),
        )  # fmt: skip


class Outputs(NamedTuple):
    """A forward's output and the statistics that its backward reads, all in float32 or better.

    The backward takes ``rho``'s gradient from ``o``, and divides by ``rho``: rounded to the input's
    precision, ``o`` would drown it.

    Attributes:
        o: ``[B, T, H, V]``.
        z1: ``[B, T, S*H, R]``, width 0 without a low-rank term; ``z2`` ``[B, T, H, R]`` likewise.
        rho: ``[B, T, H]``.
    """

    o: Tensor
    z1: Tensor
    rho: Tensor
    z2: Tensor

    @property
    def statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.z1, self.rho, self.z2
