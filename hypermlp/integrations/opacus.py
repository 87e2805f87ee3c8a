"""Per-sample gradients for Opacus (differential privacy), of layers whose tables all rows of a batch share.

Opacus makes a parameter's per-sample gradient from what goes into and comes out of the module that owns it.
What comes out of a :class:`~hypermlp.layers.sequence_mixing.LagMixing` are its tables, without a batch: so in
training each row gets tables of its own to read, and their gradients are the samples'.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypermlp.config import MixConfig
from hypermlp.layers import HyperMLP
from hypermlp.layers.feature_mixing import Gates
from hypermlp.layers.projection import Embedding, Projection
from hypermlp.layers.sequence_mixing import LagMixing
from hypermlp.ops.arguments import OperatorArgs, SequenceMix
from hypermlp.ops.attention import attend
from hypermlp.ops.varlen import Tokens


def give_per_sample_gradients(model: nn.Module) -> nn.Module:
    """Let Opacus find every parameter's per-sample gradient, in place; call it before ``PrivacyEngine.make_private``.

    In training the operator then runs row by row. Samples are rows: packed sequences (``cu_seqlens``) are refused.

    Args:
        model: with hyper layers; the same is returned.

    Example:
        >>> model, optimizer, loader = PrivacyEngine().make_private(
        ...     module=give_per_sample_gradients(model), optimizer=optimizer, data_loader=loader, ...
        ... )
    """
    _register()
    for layer in model.modules():
        if isinstance(layer, HyperMLP) and not isinstance(layer.__dict__.get("attend"), partial):
            for mix in (layer.routing_mix, layer.readout_mix):
                if mix is not None:
                    mix.register_forward_hook(_expanded)
            layer.attend = partial(_attend_by_row, layer)  # type: ignore[method-assign]
    return model


class _RowMix(NamedTuple):
    """One sequence mixing of a batch whose rows have tables of their own.

    Attributes:
        tables: diagonal, ``down`` and ``up`` side by side, those that there are, ``[B, heads, L, columns]``: first, for
            it is the first output whose gradient Opacus takes.
        core: ``[B, T, heads, R]``, or None.
    """

    tables: Tensor
    core: Tensor | None

    def rows(self, mix: MixConfig) -> list[SequenceMix]:
        """The mixing of each row, as the operator takes it."""
        found = []
        for row, tables in enumerate(self.tables.unbind()):
            diag = tables[..., 0] if mix.diag else None
            down, up = tables[..., mix.diag :].chunk(2, dim=-1) if mix.rank else (None, None)
            core = None if self.core is None else self.core[row : row + 1]
            found.append(SequenceMix(diag, down, up, core, mix.identity))
        return found


def _expanded(mix: LagMixing, args: tuple[Tensor], output: SequenceMix) -> Any:
    """In training, the tables once for every row of the batch."""
    if not (mix.training and torch.is_grad_enabled()):
        return None
    tables = [x if x.ndim == 3 else x[..., None] for x in (output.diag, output.down, output.up) if x is not None]
    return _RowMix(torch.cat(tables, dim=-1).expand(len(args[0]), -1, -1, -1), output.core)


def _attend_by_row(layer: HyperMLP, q: Tensor, k: Tensor, v: Tensor, gates: Gates, tokens: Tokens) -> Tensor:
    mixes = layer.mixes(q, gates)
    if tokens.cu_seqlens is not None and torch.is_grad_enabled():
        raise ValueError("cu_seqlens packs several samples in a row: pad them instead, a sample is a row for Opacus")
    if not any(isinstance(found, _RowMix) for found in mixes):
        return attend(OperatorArgs(q, k, v, *mixes, tokens, layer._options), layer.backend)
    configs = (layer.config.routing_mix, layer.config.readout_mix)
    by_row = [
        found.rows(config) if isinstance(found, _RowMix) and isinstance(config, MixConfig) else [found] * len(q)
        for found, config in zip(mixes, configs, strict=True)
    ]
    out = []
    for row, (first, second) in enumerate(zip(*by_row, strict=True)):
        at = slice(row, row + 1)
        own = tokens if tokens.valid is None else tokens._replace(valid=tokens.valid[at])
        out.append(attend(OperatorArgs(q[at], k[at], v[at], first, second, own, layer._options), layer.backend))
    return torch.cat(out)


def _register() -> None:
    from opacus.grad_sample import register_grad_sampler
    from opacus.grad_sample.linear import compute_linear_grad_sample

    register_grad_sampler(LagMixing)(_tables_by_sample)
    register_grad_sampler(Embedding)(_embedding_by_sample)
    register_grad_sampler(Projection)(compute_linear_grad_sample)


def _tables_by_sample(mix: LagMixing, activations: list[Tensor], backprops: Tensor) -> dict[Tensor, Tensor]:
    tables = [table for table in (mix.diag, mix.down, mix.up) if table is not None]
    columns = [table[0, 0].numel() for table in tables]
    grads = backprops.split_with_sizes(columns, dim=-1)
    return {
        table: grad.reshape(-1, *table.shape) for table, grad in zip(tables, grads, strict=True) if table.requires_grad
    }


def _embedding_by_sample(embedding: Embedding, activations: list[Tensor], backprops: Tensor) -> dict[Tensor, Tensor]:
    """Of token ids, or of the vectors that a tied head takes."""
    if not embedding.weight.requires_grad:
        return {}
    x = activations[0]
    if not x.is_floating_point():
        x = F.one_hot(x.long(), embedding.num_embeddings).to(backprops.dtype)
        x, backprops = backprops, x
    return {embedding.weight: torch.einsum("n...v,n...d->nvd", backprops, x.to(backprops.dtype))}
